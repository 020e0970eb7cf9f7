"""Adapters wherever a model is used: trained, opened beside a base, chosen, exported."""

import json
import re

import jax
import numpy as np
import pytest

import lm
from lm.cli import main
from lm.core.paths import flatten
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.interop.peft import save_adapter
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.families.gpt2 import gpt2
from tests.conformance.harness import tiny
from tests.models.test_adapters import adapted
from tests.parity.hf import ids
from tests.test_opening import tokenizer  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow
EXPERIMENT = """
from lm.data.corpus import TextData
from lm.models.adapters import LoRA
from lm.models.families.gpt2 import gpt2
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant


def experiment():
    return Experiment(
        name="tiny",
        model=gpt2(61, max_length=64, num_features=32, num_heads=4, num_layers=2),
        data=TextData("text:{folder}/text.txt", "{folder}/base/tokenizer.json", length=32),
        optimizer=AdamW(Constant(3e-2)),
        adapter=LoRA(2, alpha=4, targets=("*/q/kernel", "*/v/kernel", "*/up/kernel")),
        train=TrainConfig(steps=5, batch_size=8),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):  # noqa: F811
    """A base, a run that trained an adapter of it, and another adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    model = gpt2(61, max_length=64, num_features=32, num_heads=4, num_layers=2)
    base = Loaded(model, P.init(model, jax.random.key(0)), tokenizer)
    hf.save_directory(base, folder / "base")
    lines = [f"police fire {i:b} storm".replace("0", "a").replace("1", "b") for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "tiny.py").write_text(EXPERIMENT.format(folder=folder))
    words = ["train", str(folder / "tiny.py"), "--run-dir", str(folder / "run")]
    assert main([*words, "--init-from", str(folder / "base")]) == 0
    other = jax.jit(lambda: adapted(model, base.params, LoRA(3, dora=True)))()
    save_adapter(Loaded(model, other), folder / "other")
    return folder


def logits(loaded, **options):
    return np.asarray(loaded.logits(ids(61), **options))


def test_a_trained_adapter_goes_to_peft_and_back(folder, capsys):
    """peft's logits on the base are those of the run; and those of the adapter that we read."""
    run = lm.load(folder / "run")
    assert main(["export", str(folder / "run"), str(folder / "peft"), "--format", "peft"]) == 0
    assert "everything is in" in capsys.readouterr().out
    names = {path.name for path in (folder / "peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    # It knows its base, from which the run started.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder / "peft")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids(61)).long()).logits.numpy()
    assert np.abs(logits(lm.load(folder / "base")) - expected).max() > 1e-2
    assert np.abs(logits(run) - expected).max() <= 1e-5
    opened = lm.load(folder / "base", adapter=folder / "run")
    assert flatten(opened.params).keys() == flatten(run.params).keys()
    for path, leaf in flatten(opened.params).items():
        np.testing.assert_array_equal(leaf, flatten(run.params)[path], err_msg=path)
    opened = lm.load(folder / "base", adapter=folder / "peft")
    assert np.abs(logits(opened) - expected).max() <= 1e-5
    # Merged, it is a model of its own, without a trace of the adapter.
    words = ["export", str(folder / "run"), str(folder / "merged"), "--format", "merged"]
    assert main(words) == 0
    assert not any("adapter" in path.name for path in (folder / "merged").iterdir())
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    with torch.no_grad():
        found = merged(input_ids=torch.from_numpy(ids(61)).long()).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-5


def test_several_lie_beside_one_base(folder):
    """A run and a directory; each row is that of its adapter alone."""
    run, other = folder / "run", folder / "other"
    several = lm.load(folder / "base", adapter=(run, other))
    alone = [lm.load(folder / "base", adapter=run), lm.load(folder / "base", adapter=other)]
    ours = logits(several, adapters=[1, 0])
    np.testing.assert_allclose(ours[0], logits(alone[1])[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], logits(alone[0])[1], atol=1e-5)
    texts = ["police fire", "storm", "fire fire police storm"]
    scores, vectors = (read(several, texts, adapters=[1, 0, 1]) for read in (lm.score, lm.embed))
    for text, which, found, vector in zip(texts, (1, 0, 1), scores, vectors):
        assert abs(found.sum - lm.score(alone[which], [text])[0].sum) <= 1e-4, text
        np.testing.assert_allclose(vector, lm.embed(alone[which], [text])[0], atol=1e-5)
    with pytest.raises(ValueError, match="choose with adapters="):
        lm.score(several, texts)
    with pytest.raises(ValueError, match="no adapter 2: this model has 0 to 1, and -1 is the base"):
        lm.generate(several, ["police", "fire"], adapters=[0, 2], max_new_tokens=4)


def test_commands_take_an_adapter(folder, capsys, monkeypatch):
    """generate, chat and evaluate say with --adapter what they say of the run that trained it."""
    base, run = str(folder / "base"), str(folder / "run")
    words = ["--prompt", "police", "--max-new-tokens", "8", "--temperature", "0"]
    printed = []
    for model in ([run], [base, "--adapter", run]):
        assert main(["generate", *model, *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    measured = []
    for model in ([run], [base, "--adapter", run], [base]):
        assert main(["evaluate", *model, "--data", f"text:{folder / 'text.txt'}"]) == 0
        measured.append(json.loads(capsys.readouterr().out)["loss"])
    assert abs(measured[0] - measured[1]) <= 1e-6 and measured[0] < measured[2] - 0.1
    said = []
    for model in ([run], [base, "--adapter", run]):
        lines = iter(["police", ""])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        assert main(["chat", *model, "--max-new-tokens", "6", "--temperature", "0"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_mistakes_are_named_and_write_nothing(folder, tmp_path, capsys):
    base, run, other = (str(folder / name) for name in ("base", "run", "other"))
    hf.save_directory(Loaded(*tiny("llama")), tmp_path / "llama")
    llama, out = str(tmp_path / "llama"), str(tmp_path / "out")
    generate = ["--max-new-tokens", "2", "--adapter"]
    for words, message in [
        (["generate", llama, *generate, run], "run is an adapter of another base: .* there and"),
        (["generate", llama, *generate, other], "other is an adapter of another base: model_type"),
        (["generate", run, *generate, other], "run holds an adapter already, and .*other cannot"),
        (["generate", base, *generate, base], "base is neither a PEFT directory .* nor a run"),
        (["generate", other], "other holds a PEFT adapter: open its base .* --adapter"),
        (["export", base, out, "--format", "peft"], "base is no run, and only a run that trained"),
        (
            ["export", run, out, "--format", "gguf"],
            "a format is one of hf, merged, peft, stablehlo, not 'gguf'",
        ),
        (["export", run, llama, "--format", "peft"], "exists already"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and "Traceback" not in error, error
    assert main(["import", base, str(tmp_path / "bare")]) == 0
    for words in (
        ["generate", base, *generate, str(tmp_path / "bare")],
        ["export", str(tmp_path / "bare"), out, "--format", "peft"],
    ):
        assert main(words) == 2 and "bare holds no adapter" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give at least one"):
        lm.load(base, adapter=())
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "bare"}


def test_an_adapter_is_not_taken_from_its_base(folder, tmp_path, capsys):
    """A run that trained more than the adapter has no adapter that says what it learned."""
    config = json.loads((folder / "run/config.json").read_text())
    table = [{"class": "lm.train.trainable.Group", "pattern": "*"}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(folder / "run/checkpoints")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / name).symlink_to(folder / "run" / name)
    config["experiment"]["trainable"] = table
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for words in (
        ["generate", str(folder / "base"), "--adapter", run],
        ["export", run, out, "--format", "peft"],
    ):
        assert main(words) == 2
        assert "trained embed/table beside its adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
