"""Parameters of a model: made, counted and described without running it."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.core.paths import flatten, unflatten

Params = dict[str, Any]


def _init(model: nn.Module, key: jax.Array) -> Any:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens_BT, method="initialize")["params"]


@partial(jax.jit, static_argnums=0)
def init(model: nn.Module, key: jax.Array) -> Params:
    """Returns fresh fp32 parameters, a nested dict.

    Compiled once for each model; jit what calls it to initialise them where they will live.
    """
    return nn.unbox(_init(model, key))


def abstract(model: nn.Module) -> Params:
    """Returns the parameters' shapes and dtypes as `jax.ShapeDtypeStruct`; takes no memory."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def logical_axes(model: nn.Module) -> Params:
    """Returns, for each parameter, the tuple of its dimensions' logical axes."""
    boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(
        lambda spec: tuple(spec), specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )


def average(trees: Iterable[Params], weights: Sequence[float]) -> Params:
    """Returns the weighted mean of parameters of the same shapes, on the host.

    Args:
      trees: read one after the other, so that a generator need not hold them all.
      weights: one for each; they are divided by their sum.

    Returns:
      A nested dict of numpy arrays, summed in fp64 and rounded once, to fp32.

    Raises:
      ValueError: if the weights are not as many, or one is negative, or none is positive.
    """
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights are 0 or more, and not all 0, unlike {list(weights)}")
    total: dict[str, Any] = {}
    for tree, weight in zip(trees, weights, strict=True):
        for path, leaf in flatten(tree).items():
            part = weight / math.fsum(weights) * np.asarray(leaf, np.float64)
            total[path] = total[path] + part if path in total else part
    return unflatten({path: leaf.astype(np.float32) for path, leaf in total.items()})


def count(model_or_params: nn.Module | Params) -> int:
    """Returns the number of parameters of a model, or of a tree of arrays."""
    if isinstance(model_or_params, nn.Module):
        model_or_params = abstract(model_or_params)
    return sum(math.prod(leaf.shape) for leaf in flatten(model_or_params).values())
