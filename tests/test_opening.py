"""Models go out and come back: runs, Hugging Face directories, and a start for training."""

import json
import re

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import lm
from lm.cli import main
from lm.core.paths import flatten
from lm.data.tokenizer import SubwordTokenizer
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.layers.head import TiedHead
from lm.layers.pool import MeanPool
from lm.leaving import import_model
from lm.models.encdec import EncoderDecoder
from lm.models.tasks import for_task
from lm.opening import initial_params
from lm.train.experiment import load_experiment
from lm.train.state import fresh_params
from tests.conformance.harness import cells, tiny
from tests.interop import tiny_gguf
from tests.parity.hf import ids, right_padded
from tests.test_cli import EXPERIMENT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of fewer tokens than any tiny model, that begins and ends texts."""
    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz :,.!?"]
    library = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(["<s>", "</s>"])
    return SubwordTokenizer(library, "</s>", "<s>", "</s>", chat_template=TEMPLATE)


@pytest.mark.parametrize("name", cells("export"))
def test_every_family_goes_out_and_comes_back(name, tokenizer, tmp_path):
    model, params = tiny(name)
    path = hf.save_directory(Loaded(model, params, tokenizer), tmp_path / "first")
    import_model(path, tmp_path / "run")
    loaded = lm.load(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert loaded.model == model
    files = ("config", "tokenizer", "tokenizer_config", "generation_config")
    for file in (*(f"{name}.json" for name in files), "chat_template.jinja"):
        assert (out / file).read_text() == (path / file).read_text(), file
    ours, again = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all((ours[key] == again[key]).all() for key in ours)

    half = lm.export_model(out, tmp_path / "half", dtype="bfloat16")
    config = json.loads((half / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    left = flatten(lm.load(out, dtype="bfloat16").params)
    right = flatten(lm.load(half, dtype="bfloat16").params)
    for leaf, stored in zip(left.values(), right.values(), strict=True):
        np.testing.assert_array_equal(leaf, stored)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, half)]
    assert sizes[1] < 0.6 * sizes[0]

    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    module, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens, mask = ids(model.vocab_size), right_padded()
    inputs = dict(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask))
    options = {}
    if isinstance(model, EncoderDecoder):
        options["targets"] = ids(model.vocab_size, (2, 9), seed=1)
        inputs["decoder_input_ids"] = torch.from_numpy(options["targets"]).long()
    with torch.no_grad():
        result = module.eval()(**inputs)
    theirs = getattr(result, "prediction_logits", None)
    theirs = (result.logits if theirs is None else theirs).numpy()
    found = np.asarray(loaded.logits(tokens, mask=mask, **options))
    kept = np.ones_like(options["targets"]) if options else mask
    assert np.abs((found - theirs)[kept == 1]).max() <= 1e-4

    library = transformers.AutoTokenizer.from_pretrained(out)
    assert library("hello, you").input_ids == tokenizer.encode("hello, you")
    messages = [{"role": "user", "content": "hi"}]
    assert library.apply_chat_template(messages, tokenize=False) == (
        loaded.tokenizer.apply_chat_template(messages)
    )


def test_import_of_a_gguf_file_is_a_run(tmp_path, capsys):
    tiny_gguf.write(tmp_path / "tiny.gguf")
    run = tmp_path / "run"
    assert main(["import", str(tmp_path / "tiny.gguf"), str(run)]) == 0
    first, second = lm.load(tmp_path / "tiny.gguf"), lm.load(run)
    assert first.model == second.model
    left, right = flatten(first.params), flatten(second.params)
    assert all((left[path] == right[path]).all() for path in left)
    assert first.tokenizer.chat_template == second.tokenizer.chat_template
    assert not second.tokenizer.starts
    words = ["generate", str(run), "--prompt", "Police", "--max-new-tokens", "4"]
    assert main(words) == 0 and "Police" in capsys.readouterr().out
    for words, message in [
        (["import", str(tmp_path / "tiny.gguf"), str(run)], "exists already"),
        (["import", str(tmp_path / "none.gguf"), str(tmp_path / "x")], "there is no"),
        (["import", "package:smollm", str(tmp_path / "x")], "did you mean package:smollm2-135m"),
        (["evaluate", str(run)], "was not trained here, so say what to read"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "run"}


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, capsys):
    path = hf.save_directory(Loaded(*tiny("gpt2")), tmp_path / "in")

    def fail(*args, **options):
        raise ValueError("the disk is full")

    monkeypatch.setattr(hf, "save_file", fail)
    assert main(["export", str(path), str(tmp_path / "out")]) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr("lm.leaving.claim_run_dir", fail)
    assert main(["import", str(path), str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    lines = [f"police fire {i:b} storm".replace("0", "a").replace("1", "b") for i in range(300)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "tiny.py").write_text(EXPERIMENT.format(text=folder / "text.txt"))
    words = ["--train.steps", "2", "--train.eval-every", "0"]
    assert main(["train", str(folder / "tiny.py"), "--run-dir", str(folder / "old"), *words]) == 0
    return folder


def test_training_starts_from_a_run(folder):
    """The first loss is that of the restored parameters on the first batch."""
    experiment = load_experiment(folder / "tiny.py")
    loaded = lm.load(folder / "old")
    words = ["train", str(folder / "tiny.py"), "--run-dir", str(folder / "new")]
    words += ["--init-from", str(folder / "old"), "--train.seed", "5"]
    assert main(words) == 0
    records = [json.loads(line) for line in (folder / "new/metrics.jsonl").read_text().splitlines()]
    batch = next(experiment.data.make().train(8, 5, 0))
    expected = lm.evaluate(loaded.model, loaded.params, [batch])["loss"]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    assert abs(records[1]["loss"] - expected) <= 1e-5
    # The same command goes on, and needs what it started from no more.
    (folder / "old").rename(folder / "moved")
    assert main(words) == 0
    (folder / "moved").rename(folder / "old")


def test_a_wrong_start_is_named(folder, capsys):
    path = hf.save_directory(Loaded(*tiny("gpt2")), folder / "gpt2")
    words = ["train", str(folder / "tiny.py"), "--run-dir", str(folder / "never"), "--init-from"]
    for start, message in [
        (
            str(path),
            r"gpt2 is no start for .*: embed/table is \(61, 32\) there and \(29, 16\)",
        ),
        (str(folder / "none"), "there is no"),
    ]:
        assert main([*words, start]) == 2
        assert re.search(message, capsys.readouterr().err)
    words = ["train", str(folder / "tiny.py"), "--run-dir", str(folder / "old")]
    assert main([*words, "--init-from", str(folder / "old")]) == 2
    assert "init_from is" in capsys.readouterr().err
    assert not (folder / "never").exists()
    with pytest.raises(ValueError, match="no start"):
        initial_params(folder / "old", tiny("teeny_gpt")[0])


def test_no_other_leaf_may_be_fresh_or_left_out(tmp_path):
    body, params = tiny("bert")
    path = hf.save_directory(Loaded(body, params), tmp_path / "bert")
    for model, message in [
        (for_task(body.clone(stack=body.stack.clone(repeats=2)), "sequence"), "stack/.* there and"),
        (body.clone(head=TiedHead(), classifier=None), "head/bias is .* there and absent here"),
    ]:
        with pytest.raises(ValueError, match=message):
            initial_params(path, model)
    bare = body.clone(head=None, classifier=None)
    kept = {name: leaf for name, leaf in params.items() if name not in ("head", "classifier")}
    path = hf.save_directory(Loaded(bare, kept), tmp_path / "bare")
    with pytest.raises(ValueError, match="head/bias is absent there"):
        initial_params(path, body)


def test_a_pretrained_body_gets_a_fresh_head(tmp_path, capsys):
    """The body is the source's and the classifier that of the seed; its own heads stay behind."""
    body, params = tiny("bert")
    path = hf.save_directory(Loaded(body, params), tmp_path / "bert")
    model = for_task(body, "sequence", 5, pooler=MeanPool())
    found, fresh = flatten(initial_params(path, model, 3)), flatten(fresh_params(model, 3))
    new = {"classifier/kernel", "classifier/bias"}
    assert found.keys() == fresh.keys() > new
    for name, leaf in found.items():
        assert (leaf == (fresh if name in new else flatten(params))[name]).all(), name
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"starts from {path}; fresh: classifier/bias, classifier/kernel; left out"
    )
    assert "head/dense/kernel" in line and "pooler/dense/kernel" in line

    # A classifier of the same task goes on, with as many labels as it has.
    head = for_task(body, "sequence", 4)
    path = hf.save_directory(Loaded(head, fresh_params(head, 0)), tmp_path / "next")
    again = flatten(initial_params(path, head))
    assert (again["classifier/kernel"] == flatten(lm.load(path).params)["classifier/kernel"]).all()
    assert not capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"classifier/kernel is \(32, 4\) there and \(32, 5\) here"
    ):
        initial_params(path, for_task(body, "sequence", 5))
