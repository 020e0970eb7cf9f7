"""Scaled dot-product attention (Vaswani et al., 2017), by any of its backends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.mesh import target_platform
from lm.ops import cudnn, splash
from lm.ops.cudnn import cudnn_attend
from lm.ops.flash import flash_attend
from lm.ops.mask import Mask
from lm.ops.product import product
from lm.ops.ring import ring_attend
from lm.ops.sequence import lay_out
from lm.ops.softcap import soft_cap
from lm.ops.splash import splash_attend
from lm.ops.ulysses import ulysses_attend

Array = jax.Array


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    backend: str = "auto",
    context_parallel: str = "ulysses",
) -> Array:
    """Returns softmax(scale * q k^T + bias) v over the keys that the mask allows.

    N query heads share K key heads in groups of N / K (grouped-query attention, Ainslie et al.,
    2023); the keys are never repeated. Scores and softmax are fp32 whatever the inputs. A query
    that may see no key gets zeros.

    Under a mesh (`jax.sharding.use_abstract_mesh`) that divides the places of a row over devices,
    `context_parallel` says how each gets to the keys of the others.

    Args:
      q_BTNH: queries.
      k_BSKH: keys; N must be a multiple of K.
      v_BSKH: values.
      mask: which keys each query may see.
      bias_NTS: added to the scaled scores, such as T5's relative bias.
      scale: 1 / sqrt(H) if None.
      softcap: squashes scaled scores to cap * tanh(score / cap) (Gemma 2), if given.
      sink_N: a score of each head for no key at all, which takes weight and gives nothing (Xiao et
        al., 2024), or None.
      backend: a name in `BACKENDS`, or 'auto' for the one that `choose` chooses.
      context_parallel: 'ulysses', by the backend on whole rows of some heads (`lm.ops.ulysses`), or
        'ring', the keys in turn (`lm.ops.ring`); in `CONTEXT_PARALLEL`.

    Returns:
      (B, T, N, H) in the dtype of `v_BSKH`.

    Raises:
      ValueError: for another backend, or one that cannot compute this; or where the mesh does not
        divide this.
    """
    operands = q_BTNH, k_BSKH, v_BSKH, mask
    options = dict(bias_NTS=bias_NTS, scale=scale, softcap=softcap, sink_N=sink_N)
    if (layout := lay_out()) is None:
        return _attend(backend, "", *operands, **options)
    layout.check(q_BTNH, k_BSKH, mask)
    if context_parallel == "ulysses":
        whole_rows = partial(_attend, backend, f", ulysses over {layout.devices} devices")
        return ulysses_attend(layout, whole_rows, *operands, **options)
    if context_parallel != "ring":
        names = ", ".join(CONTEXT_PARALLEL)
        raise ValueError(f"context_parallel is one of {names}, not {context_parallel!r}")
    if backend != "auto":
        raise ValueError(
            f"ring attention computes the scores itself, and not by {backend!r}: choose the "
            "backend 'auto', or context_parallel 'ulysses'"
        )
    _note(Choice("ring", f"{describe(mask, **options)}, over {layout.devices} devices"))
    return ring_attend(layout, *operands, **options)


def _attend(
    backend: str, note: str, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, **options
) -> Array:
    """Returns `attend` of whole rows; `note` follows what the choice says of the call."""
    choice = choose(backend, q_BTNH, k_BSKH, v_BSKH, mask, **options)
    _note(choice._replace(what=choice.what + note))
    return BACKENDS[choice.backend].attend(q_BTNH, k_BSKH, v_BSKH, mask, **options)


def reference_attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, **options) -> Array:
    """Returns what `attend` does, with the scores of all places at once; arguments as there."""
    B, T, N, _ = q_BTNH.shape
    weights_BKGTS, total_BKGT = _unnormalised(q_BTNH, k_BSKH, mask, **options)
    weights_BKGTS = weights_BKGTS.astype(v_BSKH.dtype)
    if T == 1:
        weights_MGS = _by_head(weights_BKGTS[:, :, :, 0])
        out_MGH = _einsum("mgs,msh->mgh", weights_MGS, _by_head(v_BSKH.swapaxes(1, 2)))
        out_BKGTH = out_MGH.reshape(*total_BKGT.shape, -1)
    else:
        out_BKGTH = product("bkgts,bskh->bkgth", weights_BKGTS, v_BSKH)
    # Dividing the sums by the total costs one pass over (T, H) instead of one over (T, S).
    out_BKGTH /= total_BKGT[..., None]
    out_BTKGH = jnp.moveaxis(out_BKGTH, 3, 1).astype(v_BSKH.dtype)
    return out_BTKGH.reshape(B, T, N, v_BSKH.shape[-1])


def attention_weights(q_BTNH: Array, k_BSKH: Array, mask: Mask, **options) -> Array:
    """Returns the (B, N, T, S) fp32 weights of `attend`: rows sum to 1 with the sink's weight."""
    weights_BKGTS, total_BKGT = _unnormalised(q_BTNH, k_BSKH, mask, **options)
    weights_BKGTS /= total_BKGT[..., None]
    return weights_BKGTS.reshape(q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1])


def _unnormalised(
    q_BTNH: Array,
    k_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
) -> tuple[Array, Array]:
    """Returns exp(score - largest score), exactly 0 where masked, and its sum with the sink's."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    assert N % K == 0, f"{N} query heads do not group over {K} key heads"
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if T == 1:
        q_MGH, k_MSH = _by_head(q_BTKGH[:, 0]), _by_head(k_BSKH.swapaxes(1, 2))
        scores_BKGTS = _einsum("mgh,msh->mgs", q_MGH, k_MSH).reshape(B, K, N // K, T, S)
    else:
        scores_BKGTS = product("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)
    scores_BKGTS *= H**-0.5 if scale is None else scale
    scores_BKGTS = soft_cap(scores_BKGTS, softcap)
    if bias_NTS is not None:
        scores_BKGTS += bias_NTS.reshape(K, N // K, T, S).astype(jnp.float32)
    allowed_BTS = mask.allowed()
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    largest_BKGT = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1))
    if sink_N is not None:
        sink_KG1 = sink_N.astype(jnp.float32).reshape(K, N // K, 1)
        largest_BKGT = jnp.maximum(largest_BKGT, jax.lax.stop_gradient(sink_KG1))
    # A row without keys has no largest score: 0 in its place makes its weights 0, not NaN.
    largest_BKGT = jnp.where(jnp.isneginf(largest_BKGT), 0.0, largest_BKGT)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT[..., None])
    total_BKGT = weights_BKGTS.sum(axis=-1)
    if sink_N is not None:
        total_BKGT += jnp.exp(sink_KG1 - largest_BKGT)
    return weights_BKGTS, jnp.where(total_BKGT == 0, 1.0, total_BKGT)


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_head(x_BK: Array) -> Array:
    """(B, K, ...) -> (B K, ...), as `lm.layers.cache` has it: a step then copies nothing."""
    return x_BK.reshape(-1, *x_BK.shape[2:])


def accept(*operands, **options) -> None:
    """Refuses nothing."""


class Backend(NamedTuple):
    """A way to compute `attend`.

    Attributes:
      attend: the function, of the same arguments.
      refusal: returns why it cannot compute a call, or None; of the same arguments, with the
        platform (`target_platform`) after the mask.
    """

    attend: Callable[..., Array]
    refusal: Callable[..., str | None] = accept


BACKENDS = {
    "reference": Backend(reference_attend),  # Holds the scores of all places.
    "flash": Backend(flash_attend),  # Holds a block of them, on any platform.
    "cudnn": Backend(cudnn_attend, cudnn.refusal),  # NVIDIA's fused kernels.
    "splash": Backend(splash_attend, splash.refusal),  # A fused kernel for TPUs.
}
CONTEXT_PARALLEL = ("ulysses", "ring")
FLASH_LENGTH = 256
FUSED = {"gpu": "cudnn", "tpu": "splash"}


class Choice(NamedTuple):
    """Which backend computes a call of `attend`.

    Attributes:
      backend: its name; 'ring' where that takes its place.
      what: the mask and the options of the call, in words.
      instead: what was preferred to it, and why it cannot compute the call; or ''.
    """

    backend: str
    what: str
    instead: str = ""


def choose(
    backend: str,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    platform: str | None = None,
    **options,
) -> Choice:
    """Returns the backend for a call of `attend`, which 'auto' leaves open; arguments as there.

    'auto' is 'reference' below 256 queries, where there is little to save. From there on it is the
    platform's own fused kernel where that can compute the call, and 'flash' otherwise.

    Args:
      platform: as of `target_platform`; None is that.

    Raises:
      ValueError: for an unknown backend, or one that cannot compute this call.
    """
    names = ["auto", *BACKENDS]
    if backend not in names:
        raise ValueError(f"an attention backend is one of {', '.join(names)}, not {backend!r}")
    platform = platform or target_platform()
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, platform)
    what = describe(mask, **options)
    if backend != "auto":
        if reason := BACKENDS[backend].refusal(*operands, **options):
            raise ValueError(
                f"attention ({what}) cannot be computed by {backend!r}: {reason}. Choose 'auto'"
            )
        return Choice(backend, what)
    if q_BTNH.shape[1] < FLASH_LENGTH:
        return Choice("reference", what)
    if (fused := FUSED.get(platform)) is None:
        return Choice("flash", what)
    if reason := BACKENDS[fused].refusal(*operands, **options):
        return Choice("flash", what, f"{fused}: {reason}")
    return Choice(fused, what)


def describe(mask: Mask, **options) -> str:
    """Returns a mask and the options of `attend` in a few words, such as 'causal, documents'."""
    words = {
        "causal": mask.causal,
        "full": not mask.causal and mask.window is None,
        f"window {mask.window}": mask.window is not None,
        "prefix": mask.prefix_B is not None,
        "documents": mask.segments_BS is not None,
        "bias": options.get("bias_NTS") is not None,
        "soft-cap": options.get("softcap") is not None,
        "sinks": options.get("sink_N") is not None,
    }
    return ", ".join(word for word, holds in words.items() if holds)


_watching: list[list[Choice]] = []


def _note(choice: Choice) -> None:
    for choices in _watching:
        choices.append(choice)


@contextmanager
def choices() -> Iterator[list[Choice]]:
    """Gives a list of the choices of every call of `attend` that is traced meanwhile."""
    found: list[Choice] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
