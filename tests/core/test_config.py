"""Configs go to JSON and back unchanged, and every mistake is named."""

import dataclasses
import json

import pytest

from lm.core.config import differences, from_json, to_json
from lm.core.mesh import MeshShape
from lm.models.zoo import all_families
from lm.train.objectives import AlphaMix, Masked
from lm.train.optimizer import AdamW, Muon
from lm.train.schedule import Cosine, WarmupStableDecay
from lm.train.trainable import Group

VALUES = {
    "objective": AlphaMix(0.5, Masked(3, special_ids=(0, 1))),
    "optimizer": Muon(WarmupStableDecay(1e-3, warmup=10, decay=5)),
    "table": (Group("*/lora_*", optimizer=AdamW(Cosine(1e-4))), Group("*", trains=False)),
    "mesh": MeshShape(tensor=2),
    **{f"{name}": f.build(**f.tiny) for name, f in all_families().items()},
}


@pytest.mark.parametrize("name", VALUES)
def test_round_trip(name):
    value = VALUES[name]
    back = from_json(json.loads(json.dumps(to_json(value))))
    assert back == value
    assert hash(back) == hash(value)
    assert repr(back) == repr(value)


def test_defaults_fill_in():
    path = "lm.train.schedule.Cosine"
    assert from_json({"class": path, "peak": 0.1}) == Cosine(0.1)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"class": "lm.train.schedule.Cosine", "peek": 1.0}, "'peek'.*'peak'"),
        ({"class": "lm.train.schedule.Cosin", "peak": 1.0}, "'Cosin'.*'Cosine'"),
        ({"class": "lm.train.schedule.Cosine"}, "needs peak"),
        ({"class": "lm.train.schedul.Cosine"}, "no module lm.train.schedul"),
        ({"class": "os.path.join"}, "lm.…"),
        ({"class": "lm.core.config.importlib"}, "no class"),
        ({"peak": 1.0}, '"class"'),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(data)


@pytest.mark.parametrize("value", [[1], {"a": 1}, print, 1j, Cosine])
def test_only_hashable_values(value):
    with pytest.raises(ValueError, match="a config holds"):
        to_json(value)


def test_differences():
    left = to_json(AdamW(Cosine(1e-3), weight_decay=0.1))
    right = to_json(AdamW(Cosine(2e-3), weight_decay=0.1, clip_norm=None))
    assert differences(left, right) == {
        "learning_rate.peak": (1e-3, 2e-3),
        "clip_norm": (1.0, None),
    }
    assert differences(left, left) == {}
    assert differences([1, 2], [1]) == {"": ([1, 2], [1])}
    assert differences({"a": 1}, {"a": True}) == {"a": (1, True)}
    assert differences({}, {"b": 1}) == {"b": ("absent", 1)}
    kind = to_json(dataclasses.replace(AdamW(Cosine(1.0)), learning_rate=WarmupStableDecay(1.0)))
    assert "learning_rate.class" in differences(to_json(AdamW(Cosine(1.0))), kind)
