"""Adapters merged into their kernels, after a look at whether the model still computes the same."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models.decoder import Model

Array = jax.Array
# The largest difference of two logits that merging may make, as a share of the largest logit.
BOUND = 1e-3
ROWS, LENGTH = 2, 32


def merged(loaded: Loaded) -> Loaded:
    """Returns a model with its adapter merged into the kernels, stored in their own dtype.

    Raises:
      ValueError: if there is no adapter, or several; or if logits of random tokens differ from
        those of the base with its adapter by more than `BOUND` of the largest.
    """
    params = adapters.merge(loaded.params)
    difference, largest = drift(loaded.model, loaded.params, params)
    if not difference <= BOUND * largest:
        raise ValueError(
            f"merging moves logits by up to {difference:.3g}, and {BOUND * largest:.3g} is allowed "
            f"where the largest is {largest:.3g}: the kernels are stored in {loaded.dtype}; choose "
            "float32, or leave the adapter by itself (format 'peft')"
        )
    return dataclasses.replace(loaded, params=params)


def save_directory(loaded: Loaded, path: str | Path) -> Path:
    """Writes `merged(loaded)` as `lm.interop.hf.save_directory` does; errors as of both."""
    return hf.save_directory(merged(loaded), path)


def drift(model: Any, before: Any, after: Any) -> tuple[float, float]:
    """Returns how far two sets of parameters are apart: in logits of random tokens, all in fp32.

    Returns:
      The largest difference, and the largest logit of `before`.
    """
    length = min(LENGTH, model.max_length or LENGTH)
    draw = np.random.default_rng(0).integers
    tokens_BT, source_BT = draw(0, model.vocab_size, (2, ROWS, length), dtype=np.int32)
    ctx = Context(source_BS=source_BT)
    left, right = (_outputs(model, params, tokens_BT, ctx) for params in (before, after))
    pairs = [(jnp.abs(a - b).max(), jnp.abs(a).max()) for a, b in zip(left, right)]
    difference, largest = jnp.array(pairs).max(axis=0)  # Which keeps what is not a number.
    return float(difference), float(largest)


@partial(jax.jit, static_argnums=0)
def _outputs(model: Any, params: Any, tokens_BT: Array, ctx: Context) -> list[Array]:
    return model.apply({"params": params}, tokens_BT, ctx, method=_every_output)


def _every_output(model: Any, tokens_BT: Array, ctx: Context) -> list[Array]:
    """Returns logits over the vocabulary and over labels, or hidden states where there are none."""
    if not isinstance(model, Model):  # A two-tower.
        return [model(tokens_BT, ctx)[0]]
    x_BTD, _ = model.hidden(tokens_BT, ctx)
    found = []
    if model.head is not None:
        found.append(model.unembed(x_BTD, ctx))
    if model.classifier is not None:
        found.append(model.label_logits(x_BTD, ctx))
    elif model.pooler is not None:
        found.append(model.pooler(x_BTD, ctx))
    return found or [x_BTD]
