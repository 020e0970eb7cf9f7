"""Overrides reach every field, keep its type, and name what is wrong."""

import dataclasses
from typing import Literal

import pytest

from lm.core.overrides import apply_overrides, list_fields, parse
from lm.models.families.teeny_gpt import teeny_gpt
from lm.train.optimizer import AdamW, Muon
from lm.train.schedule import Cosine, WarmupStableDecay


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 10
    rate: float = 0.1
    resume: bool = True
    limit: int | None = None
    sizes: tuple[int, ...] = (1,)
    mode: Literal["jit", "pmap"] = "jit"


@dataclasses.dataclass(frozen=True)
class Config:
    model: object
    train: Train = Train()
    run_dir: str = "runs"
    checkpoint_every: int = 5
    optimizer: object = None


CONFIG = Config(teeny_gpt())


def test_sets_fields_of_every_type():
    words = """
        --train.steps 200 --train.rate=3 --train.resume false --train.limit 7 --train.sizes 3,4
        --train.mode pmap --run-dir runs/7 --checkpoint-every 9 --model.stack.repeats 2
        --model.stack.pattern.blocks.0.mixer.layer.window 16
    """
    new = apply_overrides(CONFIG, words.split())
    assert new.train == Train(200, 3.0, False, 7, (3, 4), "pmap")
    assert isinstance(new.train.rate, float)
    assert (new.run_dir, new.checkpoint_every, new.model.stack.repeats) == ("runs/7", 9, 2)
    assert new.model.stack.pattern.blocks[0].mixer.layer.window == 16
    assert CONFIG.train == Train(), "the original is left alone"
    assert apply_overrides(new, ["--train.limit", "none"]).train.limit is None
    assert hash(new.model) == hash(apply_overrides(new, []).model)


def test_a_field_may_go_by_its_own_name_where_one_has_it():
    new = apply_overrides(CONFIG, ["--steps", "3", "--mode=pmap", "--stack.repeats", "2"])
    assert new == apply_overrides(
        CONFIG, ["--train.steps", "3", "--train.mode", "pmap", "--model.stack.repeats", "2"]
    )
    # The config's own field goes first; of two that have it none is meant.
    own = dataclasses.replace(CONFIG, optimizer=Config(None))
    assert apply_overrides(own, ["--run-dir", "x"]).optimizer.run_dir == "runs"
    twice = dataclasses.replace(CONFIG, optimizer=Train())
    with pytest.raises(ValueError, match=r"called 'steps'.*did you mean 'train.steps'"):
        apply_overrides(twice, ["--steps", "3"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train.step", "3"], r"field of Train called 'step': did you mean 'steps'"),
        (["--stepz", "3"], r"did you mean 'train.steps'"),
        (["--steps", "many"], "--steps takes int, not 'many'"),
        (["--learning-rate.peak", "3"], "did you mean"),
        (["--train.steps", "many"], "--steps takes int, not 'many'"),
        (["--train.steps", "1.5"], "takes int"),
        (["--train.steps", "true"], "takes int"),
        (["--train.mode", "fast"], "jit.*pmap"),
        (["--train", "steps=1,rat=2"], "field of Train called 'rat': did you mean 'rate'"),
        (["--train", "steps=1,2"], "field of Train called '2'"),
        (["--train.sizes", "1,x"], "takes tuple"),
        (["--train.steps"], "needs a value"),
        (["--train.steps", "--run-dir"], "needs a value"),
        (["train.steps", "3"], "expected --field value"),
        (["--run-dir.x", "3"], "has no fields"),
        (["--model.stack.pattern.blocks.4.mixer", "3"], "no item 4"),
    ],
)
def test_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(CONFIG, arguments)


def test_several_fields_of_an_object_at_once():
    new = apply_overrides(CONFIG, ["--train", "steps=3, rate=2,limit=none,mode=pmap"])
    assert new.train == Train(3, 2.0, True, None, (1,), "pmap")
    again = apply_overrides(new, ["--train=steps=4"])
    assert again.train == dataclasses.replace(new.train, steps=4)


def test_another_class_keeps_the_fields_that_both_have():
    schedule = WarmupStableDecay(3e-3, warmup=7)
    config = Config(None, optimizer=AdamW(schedule, weight_decay=0.3))
    new = apply_overrides(config, ["--optimizer", "Muon", "--optimizer.learning-rate", "Cosine"])
    assert new.optimizer == Muon(Cosine(3e-3, warmup=7), weight_decay=0.3)
    with pytest.raises(ValueError, match="AdamWW"):
        apply_overrides(config, ["--optimizer", "AdamWW"])


def test_lists_what_can_be_set():
    paths = dict(list_fields(CONFIG))
    assert paths["train.steps"] == 10 and paths["model.stack.repeats"] == 4
    assert parse("12", str, "name") == "12"
