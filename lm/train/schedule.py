"""Learning rates as values: frozen dataclasses that are called on the step, traced or not.

`num_steps` None means the run's own length, which `over` fills in.
"""

from dataclasses import dataclass, replace
from math import pi

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Schedule:
    """A learning rate that reaches `peak`.

    Attributes:
      peak: the largest learning rate.
      num_steps: length of the schedule; None is the length of the run.
    """

    peak: float
    num_steps: int | None = None

    def over(self, num_steps: int) -> "Schedule":
        """Returns the schedule of a run of `num_steps`, unless it has a length of its own."""
        return self if self.num_steps is not None else replace(self, num_steps=num_steps)

    def __call__(self, step) -> jax.Array:
        """Returns the () learning rate of the update with this number, counted from 0."""
        raise NotImplementedError

    def steps(self, step) -> tuple[jax.Array, int]:
        assert self.num_steps is not None, "a schedule without a length: call over(num_steps)"
        return jnp.asarray(step, jnp.result_type(float)), self.num_steps


@dataclass(frozen=True)
class Constant(Schedule):
    """The same learning rate at every step."""

    def __call__(self, step) -> jax.Array:
        return jnp.full((), self.peak)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warmup, then half a cosine to `final` times the peak (Loshchilov and Hutter, 2017).

    Attributes:
      warmup: steps to the peak; the first one has 1/warmup of it.
      final: last learning rate, as a fraction of the peak.
    """

    warmup: int = 0
    final: float = 0.1

    def __call__(self, step) -> jax.Array:
        step, total = self.steps(step)
        decay = jnp.clip((step - self.warmup) / max(total - self.warmup, 1), 0, 1)
        cosine = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(pi * decay))
        return self.peak * jnp.where(step < self.warmup, warmed(step, self.warmup), cosine)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warmup, a plateau, then a linear decay to `final` times the peak (Hu et al., 2024).

    Attributes:
      warmup: steps to the peak; the first one has 1/warmup of it.
      decay: steps of the decay, at the end.
      final: last learning rate, as a fraction of the peak.
    """

    warmup: int = 0
    decay: int = 0
    final: float = 0.0

    def __call__(self, step) -> jax.Array:
        step, total = self.steps(step)
        fallen = jnp.clip((step - (total - self.decay)) / max(self.decay, 1), 0, 1)
        stable = 1 - (1 - self.final) * fallen
        return self.peak * jnp.where(step < self.warmup, warmed(step, self.warmup), stable)


@dataclass(frozen=True)
class SlantedTriangular(Schedule):
    """A short linear rise and a long linear fall (Howard and Ruder, 2018).

    cut = floor(T * cut_fraction);  p = t / cut before the cut, then
    1 - (t - cut) / (cut * (1 / cut_fraction - 1));  rate = peak * (1 + p * (ratio - 1)) / ratio

    Attributes:
      cut_fraction: fraction of the steps that rise.
      ratio: how much smaller the smallest learning rate is than the peak.
    """

    cut_fraction: float = 0.1
    ratio: float = 32.0

    def __call__(self, step) -> jax.Array:
        step, total = self.steps(step)
        cut = int(total * self.cut_fraction)
        if cut < 1:
            raise ValueError(
                f"a slanted triangle over {total} steps rises for {self.cut_fraction} of them, "
                "which is less than one step: train longer or raise cut_fraction"
            )
        # The same formula with fewer roundings: it ends where p is 0, and stays there.
        end = cut / self.cut_fraction
        p = jnp.where(step < cut, step / cut, (end - step) / (end - cut))
        lowest = self.peak / self.ratio
        return lowest + jnp.maximum(p, 0) * (self.peak - lowest)


def warmed(step: jax.Array, warmup: int) -> jax.Array:
    """Returns the fraction of the peak during a linear warmup."""
    return (step + 1) / max(warmup, 1)
