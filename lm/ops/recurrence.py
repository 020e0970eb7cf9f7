"""First-order linear recurrences, h_t = a_t * h_{t-1} + b_t, and Mamba's selective scan.

The forms of one recurrence compute the same thing: `sequential` place after place, `associative`
in logarithmically many passes over the whole length, and `chunked`, associative within a chunk
and sequential over the chunks, which keeps one chunk at a time in memory. Like `lax.scan`, each
returns the last state first. In all of them what comes later leaves an earlier state bitwise
alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.mesh import target_platform

Array = jax.Array


def sequential(a_BT: Array, b_BT: Array, initial_B: Array) -> tuple[Array, Array]:
    """Returns the last state and all states of h_t = a_t * h_{t-1} + b_t, one by one.

    Args:
      a_BT: (B, T, ...) factors.
      b_BT: (B, T, ...) terms, of the shape of `a_BT`.
      initial_B: (B, ...) state before the first place.

    Returns:
      (B, ...) and (B, T, ...).
    """

    def step(h_B, ab):
        h_B = ab[0] * h_B + ab[1]
        return h_B, h_B

    return _over_places(step, initial_B, (a_BT, b_BT))


def associative(a_BT: Array, b_BT: Array, initial_B: Array) -> tuple[Array, Array]:
    """As `sequential`, by a parallel prefix sum of the maps h -> a h + b (Blelloch, 1990)."""

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    b_BT = b_BT.at[:, 0].add(a_BT[:, 0] * initial_B)
    _, h_BT = jax.lax.associative_scan(after, (a_BT, b_BT), axis=1)
    return h_BT[:, -1], h_BT


def chunked(a_BT: Array, b_BT: Array, initial_B: Array, chunk: int = 64) -> tuple[Array, Array]:
    """As `sequential`, associative within chunks of `chunk` places."""
    return in_chunks(lambda h_B, ab: associative(*ab, h_B), initial_B, (a_BT, b_BT), chunk)


def in_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, chunk: int
) -> tuple[Any, Any]:
    """Runs `step(carry, inputs) -> (carry, outputs)` over chunks of places, in order.

    The backward pass keeps the carry between chunks and recomputes what is within.

    Args:
      step: maps a carry and inputs (B, C, ...) to the next carry and outputs (B, C, ...); C is
        `chunk`, and less for what is left at the end.
      carry: what `step` starts from.
      inputs: pytree of arrays (B, T, ...).
      chunk: C.

    Returns:
      The last carry, and outputs (B, T, ...).
    """
    step = jax.checkpoint(step, prevent_cse=False)
    length = jax.tree.leaves(inputs)[0].shape[1]
    count = length // chunk
    whole = count * chunk

    def split(x):
        return jnp.moveaxis(x[:, :whole].reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], whole, *x.shape[3:])

    outputs = []
    if whole:
        carry, found = jax.lax.scan(step, carry, jax.tree.map(split, inputs))
        outputs.append(jax.tree.map(join, found))
    if whole < length:
        carry, found = step(carry, jax.tree.map(lambda x: x[:, whole:], inputs))
        outputs.append(found)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)


def selective_scan(
    x_BTF: Array,
    dt_BTF: Array,
    A_FP: Array,
    B_BTP: Array,
    C_BTP: Array,
    D_F: Array,
    *,
    initial_BPF: Array | None = None,
    restart_BT: Array | None = None,
    form: str | None = None,
    chunk: int = 64,
) -> tuple[Array, Array]:
    """Runs one linear system per feature whose step size, input and output depend on the input.

    h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t (Mamba, Gu and Dao, 2023,
    algorithm 2). The states of one chunk at most are in memory together, and the backward pass
    computes them again. Everything is fp32.

    Args:
      x_BTF: inputs, F features.
      dt_BTF: step sizes, not negative; where one is 0 the state stays as it is.
      A_FP: decay rates, negative; P states per feature.
      B_BTP: how the input enters each state.
      C_BTP: how each state enters the output.
      D_F: how the input passes by the state.
      initial_BPF: state before the first place; None is zero.
      restart_BT: places that see nothing of what is before them, or None.
      form: within a chunk, 'sequential' or 'associative'; None is sequential on a CPU, where it
        is about five times faster, and associative elsewhere.
      chunk: places in a chunk.

    Returns:
      The outputs (B, T, F) and the last state (B, P, F), both fp32.
    """
    if form is None:
        form = "sequential" if target_platform() == "cpu" else "associative"
    x_BTF, dt_BTF, B_BTP, C_BTP = (
        value.astype(jnp.float32) for value in (x_BTF, dt_BTF, B_BTP, C_BTP)
    )
    if initial_BPF is None:
        initial_BPF = jnp.zeros((x_BTF.shape[0], *A_FP.shape[::-1]), jnp.float32)

    # The next two serve one place, (B, ...), and many, (B, T, ...).
    def recurrence(x_F, dt_F, B_P, restart):
        a_PF = jnp.exp(dt_F[..., None, :] * A_FP.T)
        if restart is not None:
            a_PF = jnp.where(restart[..., None, None], 0.0, a_PF)
        return a_PF, (dt_F * x_F)[..., None, :] * B_P[..., :, None]

    def read(h_PF, C_P):
        return (h_PF * C_P[..., :, None]).sum(-2)

    def place(h_BPF, inputs):
        *inputs, C_BP = inputs
        a_BPF, b_BPF = recurrence(*inputs)
        h_BPF = a_BPF * h_BPF + b_BPF
        return h_BPF, read(h_BPF, C_BP)

    def places(h_BPF, inputs):
        *inputs, C_BTP = inputs
        h_BPF, h_BTPF = associative(*recurrence(*inputs), h_BPF)
        return h_BPF, read(h_BTPF, C_BTP)

    steps = {"sequential": partial(_over_places, place), "associative": places}
    if form not in steps:
        raise ValueError(f"the form of a scan is {' or '.join(steps)}, not {form!r}")
    inputs = (x_BTF, dt_BTF, B_BTP, restart_BT, C_BTP)
    last_BPF, y_BTF = in_chunks(steps[form], initial_BPF, inputs, chunk)
    return y_BTF + D_F * x_BTF, last_BPF


def restarts(segments_BT: Array, before_B: Array | None = None) -> Array:
    """Marks the places whose document is not that of the last token before them.

    Args:
      segments_BT: (B, T) document of each place; 0 is padding, which never restarts anything.
      before_B: (B,) document of the last token before the first place; 0 or None for none.

    Returns:
      (B, T) booleans.
    """
    if before_B is None:
        before_B = jnp.zeros_like(segments_BT[:, 0])
    joined_BT = jnp.concatenate([before_B[:, None], segments_BT], axis=1)
    index_T = jnp.arange(joined_BT.shape[1])
    newest_BT = jax.lax.cummax(jnp.where(joined_BT != 0, index_T, 0), axis=1)
    document_BT = jnp.take_along_axis(joined_BT, newest_BT, axis=1)
    return document_BT[:, 1:] != document_BT[:, :-1]


def _over_places(step: Callable, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`lax.scan` over the second dimension instead of the first."""
    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(_swap, inputs))
    return carry, jax.tree.map(_swap, outputs)


def _swap(x: Array) -> Array:
    return jnp.moveaxis(x, 1, 0)
