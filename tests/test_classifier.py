"""A classifier from a pretrained body with an adapter, through the commands."""

import contextlib
import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest

import lm
from lm.cli import main
from lm.core.paths import flatten
from lm.data import labelled
from lm.eval.classification import scores
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.models.adapters import LoRA
from lm.models.families.gpt2 import gpt2
from lm.train.experiment import load_experiment
from lm.train.state import fresh_params

pytestmark = pytest.mark.slow
EXPERIMENT = """
from lm.data.labelled import LabelledData
from lm.layers.pool import Dense, MeanPool
from lm.models.adapters import LoRA
from lm.models.families.gpt2 import gpt2
from lm.models.tasks import for_task
from lm.train.experiment import Experiment, TrainConfig
from lm.train.objectives import Conditional
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment():
    body = gpt2(300, 24, num_features=16, num_heads=2, num_layers=1)
    return Experiment(
        name="toy",
        model=for_task(body, "sequence", 2, pooler=Dense(MeanPool())),
        data=LabelledData("toy", "bpe:300", length=16),
        objective=Conditional(),
        optimizer=AdamW(Cosine(3e-2, warmup=5)),
        train=TrainConfig(steps=30, batch_size=16),
        adapter=LoRA(rank=2),
    )
"""


def pairs():
    rng = np.random.default_rng(0)
    for number in range(400):
        good = bool(rng.integers(2))
        word = ("dreadful", "splendid")[good]
        yield f"a {word} film of {number} {' '.join(rng.choice(list('abc'), 3))}", str(good)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run that began from a language model's directory."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "toy.py").write_text(EXPERIMENT)
    body = gpt2(300, 24, num_features=16, num_heads=2, num_layers=1)
    hf.save_directory(Loaded(body, fresh_params(body, 7)), folder / "body")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labelled.SETS, "toy", labelled.LabelledSet("made here", pairs))
        yield folder
    labelled.labelled_texts.cache_clear()


@pytest.fixture(scope="module")
def printed(folder):
    """What the command that made the run printed."""
    words = ["--run-dir", str(folder / "run"), "--init-from", str(folder / "body")]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["train", str(folder / "toy.py"), *words]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def run(folder, printed):
    return folder / "run"


def test_the_head_trains_beside_the_adapter(folder, run):
    """What was pretrained stays bit for bit; the adapter, the pooler and the classifier move."""
    before = flatten(lm.load(folder / "body").params)
    after = flatten(lm.load(run).params)
    fresh = flatten(fresh_params(lm.load(run).model, 0))
    names = after.keys() - before.keys()
    assert {name.split("/")[0] for name in names} == {"stack", "pooler", "classifier"}
    for name, leaf in after.items():
        if name in before:
            assert (leaf == before[name]).all(), name
        elif name in fresh:
            assert (leaf != fresh[name]).any(), name
        else:
            scale = 16 / 2
            assert (leaf == scale).all() if name.endswith("lora_scale") else leaf.any(), name


def test_without_an_adapter_everything_trains(folder):
    experiment = load_experiment(folder / "toy.py")
    recipe = dataclasses.replace(experiment, adapter=None).recipe()
    assert not recipe.split(fresh_params(recipe.model, 0))[1]
    # An adapter of the head's own kernels keeps its scale.
    recipe = dataclasses.replace(experiment, adapter=LoRA(2, targets=("*/kernel",))).recipe()
    params = recipe.prepare(fresh_params(recipe.model, 0), jax.random.key(0))
    trained = flatten(recipe.split(params)[0])
    assert "pooler/dense/lora_a" in trained and "pooler/dense/lora_scale" not in trained
    assert "classifier/kernel" in trained and "embed/table" not in trained


def test_evaluate_prints_accuracy_and_macro_f1(printed, run, capsys):
    assert f"next: lm evaluate {run} --split test" in printed
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test" and found["majority"]["accuracy"] < 0.9
    loaded = lm.load(run)
    texts, labels = zip(*labelled.labelled_texts("toy")["test"])
    said = [answer.label for answer in lm.classify(loaded, texts, length=16)]
    expected = scores(*(np.array(each) == "True" for each in (labels, said)))
    assert found["this model"] == pytest.approx(expected) and expected["accuracy"] > 0.9
    assert (
        json.loads((run / "classification.json").read_text())["this model"] == found["this model"]
    )
    assert main(["evaluate", str(run), "--split", "holdout"]) == 2
    assert "'holdout'" in capsys.readouterr().err


def test_classify_prints_labels(run, folder, capsys):
    texts = ["a splendid film of 7 a b", "a dreadful film of 9 c c"]
    assert lm.load(run).labels == ("False", "True")
    assert main(["classify", str(run), "--text", *texts]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, label, text in zip(lines, ("True", "False"), texts, strict=True):
        assert re.match(rf"{label}  [01]\.\d{{3}}  ", line) and line.endswith(text)
    assert main(["classify", str(folder / "body"), "--text", "a"]) == 2
    assert "has no classifier" in capsys.readouterr().err
    # The head comes with the adapter, onto a body that has none.
    assert lm.classify(lm.load(folder / "body", adapter=run), texts) == lm.classify(
        lm.load(run), texts
    )
    lm.merge_model(run, folder / "merged")
    assert lm.load(folder / "merged").labels == ("False", "True")
    assert [said for said, _ in lm.classify(lm.load(folder / "merged"), texts)] == ["True", "False"]
