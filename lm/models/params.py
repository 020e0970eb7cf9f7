"""Parameters of a model: made, counted and described without running it."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.paths import flatten

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


def count(model_or_params: nn.Module | Params) -> int:
    """Returns the number of parameters of a model, or of a tree of arrays."""
    if isinstance(model_or_params, nn.Module):
        model_or_params = abstract(model_or_params)
    return sum(math.prod(leaf.shape) for leaf in flatten(model_or_params).values())
