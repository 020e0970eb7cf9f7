"""Optimizers as values: AdamW and Muon, by group, after clipping all trained gradients together.

Weight decay acts on leaves named `kernel`, `lora_a` and `lora_b`, the matrices that multiply
activations, and on nothing else: not on embedding and position tables, norms, biases, or other
vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from lm.train.schedule import Schedule

Axes = Mapping[str, tuple[str | None, ...]]
Rate = Callable[[Any], jax.Array]


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers have.

    Attributes:
      learning_rate: a schedule.
      weight_decay: fraction of a kernel taken off per unit of learning rate (Loshchilov and
        Hutter, 2019).
      clip_norm: largest global norm of the gradient of all trained parameters, None for no limit.
    """

    learning_rate: Schedule
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def transform(self, rate: Rate, decay: float, axes: Axes) -> optax.GradientTransformation:
        """Returns the optax transformation of one group.

        Args:
          rate: its learning rate, of the step.
          decay: its weight decay.
          axes: path -> logical axes, of all parameters of the model.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(Optimizer):
    """m / (sqrt(v) + eps), m and v the unbiased moving means of g and g^2 (Kingma and Ba, 2015).

    Attributes: those of `Optimizer`, and
      beta1, beta2: how slowly m and v move.
      eps: added to the square root.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def transform(self, rate: Rate, decay: float, axes: Axes) -> optax.GradientTransformation:
        return optax.adamw(rate, self.beta1, self.beta2, self.eps, weight_decay=decay, mask=decays)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for kernels; Adam for all else (Jordan, 2024).

    The kernel of each layer is one matrix, from all that it contracts to all that it makes: a
    (D, N, H) query kernel is D by N H. The head, an embedding in reverse, goes to Adam. Updates
    are scaled by 0.2 sqrt(max(inputs, outputs)), to AdamW's size, so that both parts share one
    learning rate (Liu et al., 2025).

    Attributes: those of `Optimizer`, and
      momentum: how slowly the momentum moves.
      num_iterations: of Newton-Schulz.
      beta1, beta2: of Adam.
    """

    momentum: float = 0.95
    num_iterations: int = 5
    beta1: float = 0.9
    beta2: float = 0.95

    def transform(self, rate: Rate, decay: float, axes: Axes) -> optax.GradientTransformation:
        def dimensions(path: str) -> MuonDimensionNumbers | None:
            return muon_dimensions(path, axes.get(path))

        muon = optax.contrib.muon(
            rate,
            beta=self.momentum,
            ns_steps=self.num_iterations,
            weight_decay=decay,
            weight_decay_mask=decays,
            muon_weight_dimension_numbers=partial(by_path, dimensions),
            consistent_rms=0.2,
        )
        # Optax's own Adam for the rest would have Nesterov momentum, and no mask for decay.
        adam = AdamW(self.learning_rate, beta1=self.beta1, beta2=self.beta2)
        return optax.partition(
            {"muon": muon, "adam": adam.transform(rate, decay, axes)},
            partial(by_path, lambda path: "adam" if dimensions(path) is None else "muon"),
        )


def muon_dimensions(path: str, axes: tuple[str | None, ...] | None) -> MuonDimensionNumbers | None:
    """Returns which dimensions of a parameter are inputs and outputs, or None for Adam's.

    A kernel of two dimensions is inputs by outputs. Of more, one side is the single dimension D of
    the residual stream, named 'embed': the inputs if it comes first, otherwise the outputs, last.
    A leading 'layers' is on neither side, so that each layer is a matrix of its own.
    """
    if not is_kernel(path) or axes is None or "vocab" in axes:
        return None
    first = 1 if axes[0] == "layers" else 0
    dims = tuple(range(first, len(axes)))
    num_in = 1 if axes[first] == "embed" else len(dims) - 1
    if len(dims) < 2:
        return None
    return MuonDimensionNumbers(dims[:num_in], dims[num_in:])


def is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def decays(params: Any) -> Any:
    """Returns True for the leaves that weight decay acts on, False for the others."""
    return by_path(is_matrix, params)


def is_matrix(path: str) -> bool:
    """Whether a leaf multiplies activations: a kernel, or a factor of an adapter."""
    return path.rpartition("/")[2] in ("kernel", "lora_a", "lora_b")


def by_path(function: Callable[[str], Any], params: Any) -> Any:
    """Maps the path of every leaf; unlike `lm.core.paths`, it lets optax's masked leaves be."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: function("/".join(str(key.key) for key in keys)), params
    )
