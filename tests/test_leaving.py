"""What leaves: formats of export, merged runs, averages of checkpoints."""

import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.cli import main
from lm.core.config import to_json
from lm.core.paths import flatten, map_with_path
from lm.data.corpus import TextData
from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.leaving import average_models, export_model, import_model, merge_model
from lm.models import adapters
from lm.opening import load
from lm.train.checkpoint import Checkpoints
from lm.train.run_dir import claim_run_dir
from lm.train.state import TrainState
from tests.conformance.harness import tiny
from tests.models.test_adapters import LORAS, adapted
from tests.parity.hf import ids


def write_run(folder, model, steps, lora=None, data=None):
    """Writes a run with the parameters of each step."""
    experiment = {"model": to_json(model), "adapter": to_json(lora), "data": to_json(data)}
    claim_run_dir(folder, {"experiment": experiment}, teeny_gpt_tokenizer())
    with closing(Checkpoints(folder / "checkpoints", keep=9)) as checkpoints:
        for step, params in steps.items():
            state = TrainState(jnp.int32(step), params, {}, jax.random.PRNGKey(0))
            checkpoints.save(state, step, {})
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of a llama with an adapter, and a text that it may be measured on."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "text.txt").write_text("\n".join(f"police storm {i:b}" for i in range(200)))
    model, params = tiny("llama")
    data = TextData(f"text:{folder / 'text.txt'}", "teeny_gpt", length=32)
    params = adapted(model, params, LORAS["lora"])
    return write_run(folder / "run", model, {3: params}, LORAS["lora"], data)


@pytest.mark.slow
def test_an_adapter_leaves_merged_or_by_itself(tuned, tmp_path, capsys):
    """The plain format has no place for it, and says what has."""
    assert main(["export", str(tuned), str(tmp_path / "out")]) == 2
    assert "'merged' to merge it into its kernels, or 'peft'" in capsys.readouterr().err
    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "merged"]) == 0
    tokens = ids(61)
    ours = load(tuned).logits(tokens)
    assert jnp.abs(load(tmp_path / "out").logits(tokens) - ours).max() <= 1e-5
    words = ["export", str(tuned), str(tmp_path / "hlo"), "--format", "stablehlo"]
    assert main([*words, "--cache-length", "12", "--dtype", "bfloat16"]) == 0
    manifest = json.loads((tmp_path / "hlo" / "manifest.json").read_text())
    assert manifest["cache_length"] == 12 and manifest["dtype"] == "bfloat16"
    kinds = {about["dtype"] for about in manifest["weights"].values()}
    assert kinds == {"bfloat16"}
    capsys.readouterr()
    for words, message in [
        (["--format", "onnx"], "a format is one of hf, merged, peft, stablehlo"),
        (["--cache-length", "12"], "cache_length are of --format stablehlo, not of hf"),
        (["--format", "merged", "--dtype", "float16"], "dtype is 'float32' or 'bfloat16'"),
        (["--format", "merged", "--dtype", "bfloat16"], "merging moves logits by up to"),
    ]:
        assert main(["export", str(tuned), str(tmp_path / "new"), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists already"):
        export_model(tuned, tmp_path / "out", "merged")
    with pytest.raises(ValueError, match="hold no adapter"):
        export_model(tmp_path / "out", tmp_path / "new", "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "hlo"}


@pytest.mark.slow
def test_merged_run(tuned, tmp_path, capsys):
    """The same function, a run without an adapter, measured on the same data."""
    with pytest.raises(ValueError, match="holds an adapter: `lm merge`"):
        import_model(tuned, tmp_path / "run")
    assert main(["merge", str(tuned), str(tmp_path / "run")]) == 0
    merged = load(tmp_path / "run")
    expected = flatten(adapters.merge(load(tuned).params))
    for path, leaf in flatten(merged.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert merged.model == tiny("llama")[0] and merged.tokenizer == teeny_gpt_tokenizer()
    capsys.readouterr()
    losses = []
    for run in (tuned, tmp_path / "run"):
        assert main(["evaluate", str(run), "--batch-size", "8"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert abs(losses[0] - losses[1]) <= 1e-5
    with pytest.raises(ValueError, match="hold no adapter"):
        merge_model(tmp_path / "run", tmp_path / "again")
    with pytest.raises(ValueError, match="exists already"):
        merge_model(tuned, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.fixture(scope="module")
def steps():
    """Parameters of three steps of one run."""
    model, params = tiny("teeny_gpt")
    params = jax.device_get(params)

    def moved(step):
        return map_with_path(lambda path, x: x * np.float32(step / 7 + len(path)), params)

    return model, {step: moved(step) for step in (100, 200, 300)}


def mean_of(trees, weights, path):
    """By numpy, in fp64."""
    leaves = [np.asarray(flatten(tree)[path], np.float64) for tree in trees]
    return np.average(leaves, axis=0, weights=weights).astype(np.float32)


def test_average_of_steps_and_of_runs(steps, tmp_path):
    model, params = steps
    data = TextData("text:none.txt", "teeny_gpt")
    write_run(tmp_path / "run", model, params, data=data)
    for step, each in params.items():
        write_run(tmp_path / str(step), model, {1: each})
    run = str(tmp_path / "run")
    words = ["average", run, "--out", str(tmp_path / "a"), "--steps", "100,300", "--weights", "1,3"]
    assert main(words) == 0
    runs = [str(tmp_path / str(step)) for step in params]
    assert main(["average", *runs, "--out", str(tmp_path / "b")]) == 0
    three = list(params.values())
    for name, trees, weights in [("a", three[::2], [1, 3]), ("b", three, [1, 1, 1])]:
        mean = load(tmp_path / name)
        assert mean.model == model and mean.tokenizer == teeny_gpt_tokenizer()
        for path, leaf in flatten(mean.params).items():
            np.testing.assert_allclose(leaf, mean_of(trees, weights, path), rtol=2e-7, err_msg=path)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["experiment"]["data"] == to_json(data)


def test_an_average_that_is_none(steps, tuned, tmp_path, capsys):
    model, params = steps
    run = str(write_run(tmp_path / "run", model, params))
    other = str(hf.save_directory(Loaded(*tiny("gpt2")), tmp_path / "gpt2"))
    out = tmp_path / "out"
    for words, message in [
        ([run], "of two checkpoints or more"),
        ([run, run, "--weights", "1,2,3"], "there are 2 checkpoints and 3 weights"),
        ([run, run, "--weights", "1,-1"], "weights are 0 or more, and not all 0"),
        ([run, run, "--weights", "0,0"], "weights are 0 or more, and not all 0"),
        ([run, run, "--weights", "1,x"], "'1,x' is no list such as 1,2"),
        ([run, run, "--steps", "100,200"], "steps are of one run"),
        ([other, "--steps", "100,200"], "steps are of one run"),
        ([run, "--steps", "100,250"], "checkpoints of the steps [100, 200, 300], not 250"),
        ([run, other], f"{other} has other shapes than {run}: "),
        ([str(tuned), str(tuned)], "holds an adapter: merge it first"),
        ([run, str(tmp_path / "none")], "there is no "),
    ]:
        assert main(["average", *words, "--out", str(out)]) == 2, words
        assert message in capsys.readouterr().err, words
    with pytest.raises(ValueError, match="exists already"):
        average_models([run, run], tmp_path / "gpt2")
    assert not out.exists()
