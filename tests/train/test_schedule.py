"""Learning rates against their formulas, at every step."""

import math

import jax
import jax.numpy as jnp
import pytest

from lm.train.schedule import Constant, Cosine, SlantedTriangular, WarmupStableDecay


def every_step(schedule, num_steps):
    """All of a schedule's values in double precision, traced."""
    with jax.enable_x64(True):
        return jax.jit(jax.vmap(schedule))(jnp.arange(num_steps)).tolist()


@pytest.mark.ledger("L10")
@pytest.mark.parametrize("total, cut_fraction", [(1000, 0.1), (997, 0.1), (64, 0.25)])
def test_slanted_triangular(total, cut_fraction):
    """The paper's piecewise formula at every step; peak at the cut; max / 32 at the ends."""
    peak, ratio = 0.01, 32
    schedule = SlantedTriangular(peak, total, cut_fraction)
    cut = math.floor(total * cut_fraction)
    ours = every_step(schedule, total + 1)
    for t in range(total + 1):
        if t < cut:
            p = t / cut
        else:
            p = 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        # Where T is no multiple of 1 / cut_fraction the paper's p ends a little below 0.
        expected = peak * (1 + max(p, 0) * (ratio - 1)) / ratio
        assert abs(ours[t] - expected) <= 1e-9, t
        assert abs(float(schedule(t)) - expected) <= 1e-9, t
    assert ours.index(max(ours)) == cut and abs(max(ours) - peak) <= 1e-9
    assert abs(min(ours) - peak / ratio) <= 1e-9
    assert ours[0] == min(ours)


def test_slanted_triangular_needs_a_step_to_rise():
    with pytest.raises(ValueError, match="less than one step"):
        SlantedTriangular(0.01, 5)(0)


def test_cosine():
    peak, total, warmup, final = 0.3, 100, 10, 0.1
    ours = every_step(Cosine(peak, total, warmup, final), total + 5)
    for t in range(total + 5):
        if t < warmup:
            expected = peak * (t + 1) / warmup
        else:
            done = min((t - warmup) / (total - warmup), 1)
            expected = peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
        assert abs(ours[t] - expected) <= 1e-12, t


def test_warmup_stable_decay():
    peak, total, warmup, decay = 0.3, 100, 10, 20
    ours = every_step(WarmupStableDecay(peak, total, warmup, decay), total + 1)
    assert ours[warmup - 1 : total - decay + 1] == [peak] * (total - decay - warmup + 2)
    assert abs(ours[0] - peak / warmup) <= 1e-12
    assert abs(ours[total - decay // 2] - peak / 2) <= 1e-12
    assert ours[total] == 0


def test_a_schedule_takes_the_length_of_the_run():
    assert Cosine(1.0).over(50) == Cosine(1.0, 50)
    assert Cosine(1.0, 20).over(50) == Cosine(1.0, 20)
    assert float(Constant(0.5)(7)) == 0.5
    # One length for all steps: traced steps do not compile anew.
    count = []

    @jax.jit
    def rate(step):
        count.append(1)
        return Cosine(1.0, 10)(step)

    assert [float(rate(t)) > 0 for t in range(5)] == [True] * 5 and len(count) == 1
