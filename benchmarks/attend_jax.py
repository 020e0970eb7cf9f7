"""Contestants of `benchmarks.attention` that run on jax: this library's backends, and jax.nn."""

from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.inputs import attention_operands
from benchmarks.shapes import DTYPES
from benchmarks.worker import Work
from lm.core.runtime import prepare

prepare()

import jax
import jax.numpy as jnp
import numpy as np

from lm.ops.attention import attend
from lm.ops.mask import Mask


def by_lm(q: jax.Array, k: jax.Array, v: jax.Array, window: int, backend: str) -> jax.Array:
    places = np.arange(q.shape[1])
    mask = Mask(places, places, causal=True, window=window or None)
    return attend(q, k, v, mask, backend=backend)


def by_jax(q: jax.Array, k: jax.Array, v: jax.Array, window: int, backend: str) -> jax.Array:
    width = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=width, implementation=backend
    )


def make(function: str, backend: str, dtype: str, tokens: int, about: str) -> Work:
    """Returns the work of attending forwards and backwards.

    Args:
      function: 'by_lm' or 'by_jax'.
      backend: as that function has it.
      dtype: 'fp32' or 'bf16', of the operands.
      tokens: of a batch, whatever its length.
      about: what the report calls it.
    """
    attention: Callable[..., jax.Array] = globals()[function]
    facts: dict[str, Any] = {"settings": about, "device": jax.devices()[0].device_kind}

    @cache
    def program(length: int, window: int) -> tuple[Callable, list[jax.Array]]:
        operands = [
            jnp.asarray(x, DTYPES[dtype]) for x in attention_operands(tokens // length, length)
        ]

        def loss(q, k, v, weigh):
            out = attention(q, k, v, window, backend)
            return (out.astype(jnp.float32) * weigh).sum()

        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*operands)
        return lowered.compile(), operands

    def run(count: int, length: int, window: int) -> list[dict[str, float]]:
        compiled, operands = program(length, window)
        values = []
        for _ in range(count):
            loss, grads = compiled(*operands)
            jax.block_until_ready(grads)
            sizes = [float(jnp.abs(grad.astype(jnp.float32)).sum()) for grad in grads]
            memory = compiled.memory_analysis().temp_size_in_bytes
            values.append({"loss": float(loss), "gradients": sum(sizes), "temporaries": memory})
        return values

    return Work(run, facts)
