"""Splash attention on TPUs: jax's own Pallas kernel, which skips the blocks that a mask hides."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from lm.core.mesh import BATCH_AXES, RULES, automatic_axes
from lm.ops.mask import Mask

Array = jax.Array
LANES = 128
BLOCKS = (512, 256, LANES)


def splash_attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Returns what `lm.ops.attention.attend` does; arguments as there.

    Under a mesh (`jax.sharding.use_abstract_mesh`) each device computes its own rows and heads: no
    compiler divides a kernel by itself.

    Args:
      interpret: whether to run the kernel's operations one by one, on any platform.
    """
    assert bias_NTS is None and mask.prefix_B is None, "see `refusal`"
    (B, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    q_BTNH = q_BTNH * jnp.asarray(H**-0.5 if scale is None else scale, q_BTNH.dtype)
    segments = _segments(mask, B, T, S)

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0))).swapaxes(1, 2)

    def whole(q_BNTH, k_BKSH, v_BKSH, segments, sink_N):
        kernel = _kernel(mask, q_BNTH.shape[1:3], k_BKSH.shape[2], softcap, interpret)
        in_axes = (0, 0, 0, None if segments is None else 0, None)
        return jax.vmap(kernel, in_axes)(q_BNTH, k_BKSH, v_BKSH, segments, sink_N)

    operands = (*map(heads_first, (q_BTNH, k_BSKH, v_BSKH)), segments, sink_N)
    if _mesh() is not None:
        rows, rows_heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, RULES["heads"])
        specs = (*[rows_heads] * 3, rows, PartitionSpec(RULES["heads"]))
        whole = jax.shard_map(
            whole,
            in_specs=specs,
            out_specs=rows_heads,
            axis_names=set(automatic_axes()),
            check_vma=False,
        )
    out_BNTH = whole(*operands)
    out_BTNH = out_BNTH.swapaxes(1, 2)[:, :T]
    if mask.segments_BT is None:
        return out_BTNH
    # To the kernel padding is one more document.
    return jnp.where((mask.segments_BT != 0)[..., None, None], out_BTNH, 0)


def _mesh() -> AbstractMesh | None:
    """Returns the mesh over whose devices the compiler would divide what is traced, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if any(size > 1 for size in automatic_axes().values()) else None


def _segments(mask: Mask, B: int, T: int, S: int) -> tuple[Array, Array] | None:
    """Returns the (B, T) and (B, S) documents, filled up to whole blocks with padding."""
    if mask.segments_BS is None and T % LANES == S % LANES == 0:
        return None
    segments_BT, segments_BS = mask.segments_BT, mask.segments_BS
    if segments_BS is None:
        segments_BS = jnp.ones((1, S), jnp.int32)
    if segments_BT is None:
        segments_BT, segments_BS = jnp.ones((1, T), jnp.int32), (segments_BS != 0).astype(jnp.int32)

    def fill(x: Array) -> Array:
        x = jnp.broadcast_to(x, (B, x.shape[1])).astype(jnp.int32)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))

    return fill(segments_BT), fill(segments_BS)


def _kernel(
    mask: Mask, queries: tuple[int, int], keys: int, softcap: float | None, interpret: bool
) -> Callable:
    """Returns the kernel of one row, for (N, T) queries and S keys: of q, k, v, segments, sinks."""
    # Importing it takes as long as all else here, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    heads, length = queries
    shape = (length, keys)
    if mask.window is not None:
        sides = (mask.window - 1, 0 if mask.causal else mask.window - 1)
        of_head = kernels.LocalMask(shape, sides, 0)
    else:
        of_head = (kernels.CausalMask if mask.causal else kernels.FullMask)(shape)
    q, k = (next(block for block in BLOCKS if size % block == 0) for size in shape)
    kernel = kernels.make_splash_mha_single_device(
        kernels.splash_attention_mask.MultiHeadMask([of_head] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def row(q_NTH, k_KSH, v_KSH, segments, sink_N):
        ids = None if segments is None else kernels.SegmentIds(*segments)
        return kernel(q_NTH, k_KSH, v_KSH, ids, sink_N)

    return row


def refusal(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    platform: str,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
) -> str | None:
    """Returns why splash cannot compute this on a platform ('cpu', 'gpu', 'tpu'), or None."""
    (B, T), (S, K) = q_BTNH.shape[:2], k_BSKH.shape[1:3]
    mesh = _mesh()
    lost = jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1
    rows = heads = 1
    if mesh is not None:
        rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        heads = mesh.shape[RULES["heads"]]
    reasons = {
        f"it runs on TPUs, and this is a {platform}": platform != "tpu",
        f"it computes in bfloat16 or float32, and this is {q_BTNH.dtype}": q_BTNH.dtype
        not in (jnp.bfloat16, jnp.float32),
        "it has no bias on the scores": bias_NTS is not None,
        "its masks are the same for every row, and prefixes are not": mask.prefix_B is not None,
        "it has no place for keys of a cache": not mask.is_plain(),
        f"causal or with a window, it takes as many keys as queries, and these are {S} and {T}": (
            (mask.causal or mask.window is not None) and S != T
        ),
        f"{rows} devices do not divide {B} rows, or {heads} not {K} heads": B % rows or K % heads,
        "there are several devices and no mesh that says how they divide the rows": lost,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
