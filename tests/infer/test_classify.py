"""Labels and probabilities of texts equal those of transformers."""

import jax
import numpy as np
import pytest

import lm
from lm.data.labelled import between_ends
from lm.data.tokenizer import train_wordpiece
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.models import params as P
from lm.models.families.bert import FAMILY
from lm.models.tasks import for_task
from tests.conformance.harness import tiny

transformers = pytest.importorskip("transformers")
NAMES = ("bad", "good", "neither")
TEXTS = ["a good film", "bad", "a film of bad acts and good songs, bad songs, good acts"]


@pytest.fixture(scope="module")
def loaded():
    model = for_task(FAMILY.build(**FAMILY.tiny), "sequence", 3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), P.abstract(model)
    )
    return Loaded(model, params, train_wordpiece(TEXTS, 60), labels=NAMES)


def test_equals_transformers(loaded, tmp_path):
    path = hf.save_directory(loaded, tmp_path / "out")
    theirs = transformers.pipeline("text-classification", str(path), top_k=None)
    again = lm.load(path)
    assert again.labels == NAMES
    for text, ours, expected in zip(TEXTS, lm.classify(again, TEXTS), theirs(TEXTS)):
        assert ours.label == expected[0]["label"], text
        for row in expected:
            assert abs(ours.probabilities[row["label"]] - row["score"]) <= 1e-5, text
    assert lm.classify(loaded, TEXTS) == lm.classify(again, TEXTS)


def test_a_long_text_is_cut(loaded):
    """It keeps its end token; a text reads the same alone and beside others."""
    rows = between_ends(loaded.tokenizer, TEXTS, 6)
    assert [len(row) for row in rows] == [5, 3, 6]
    assert {row[-1] for row in rows} == {loaded.tokenizer.eos_id}
    cut = loaded.tokenizer.decode(rows[2])
    left, right = lm.classify(loaded, [cut]), lm.classify(loaded, TEXTS, length=6)[2:]
    for name in NAMES:
        np.testing.assert_allclose(
            left[0].probabilities[name], right[0].probabilities[name], atol=1e-6
        )
    with pytest.raises(ValueError, match="3 places or more"):
        lm.classify(loaded, TEXTS, length=2)


def test_labels_without_names_have_numbers(loaded):
    nameless = Loaded(loaded.model, loaded.params, loaded.tokenizer)
    assert list(lm.classify(nameless, ["bad"])[0].probabilities) == [
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    ]


def test_other_models_are_refused(loaded):
    with pytest.raises(ValueError, match="has no classifier of whole texts"):
        lm.classify(Loaded(*tiny("gpt2"), loaded.tokenizer), TEXTS)
    with pytest.raises(ValueError, match="there is no text"):
        lm.classify(loaded, [])
