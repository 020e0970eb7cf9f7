"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from lm.ops.mask import Mask

Array = jax.Array


def cudnn_attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    *,
    bias_NTS: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
) -> Array:
    """Returns what `lm.ops.attention.attend` does; arguments as there.

    Causality, and a window with it, are the kernel's own and skip what they hide. Any other mask,
    that of packed documents above all, is handed over as (B, 1, T, S) numbers to add, so that its
    memory is quadratic in the length, though not times the heads.
    """
    assert bias_NTS is None and softcap is None and sink_N is None, "see `refusal`"
    allowed_BTS, window = None, None
    if has_own_mask(mask):
        window = None if mask.window is None else (mask.window - 1, 0)
    else:
        allowed_BTS = jnp.broadcast_to(mask.allowed(), (q_BTNH.shape[0], *mask.allowed().shape[1:]))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=None if allowed_BTS is None else allowed_BTS[:, None],
        scale=scale,
        is_causal=mask.causal and mask.prefix_B is None,
        local_window_size=window,
        implementation="cudnn",
    )
    if allowed_BTS is None:
        return out_BTNH
    # The kernel takes the mean of all values where every key is hidden.
    return jnp.where(allowed_BTS.any(axis=-1)[..., None, None], out_BTNH, 0)


def has_own_mask(mask: Mask) -> bool:
    """Returns whether the kernel knows the mask by name, as full, causal or a causal window."""
    plain = mask.prefix_B is None and mask.segments_BS is None
    return plain and (mask.window is None or mask.causal)


def capability() -> float | None:
    """Returns the compute capability of the first device, if it is one of NVIDIA's."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    return float(found) if jax.default_backend() == "gpu" and found else None


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
    """Returns why cuDNN cannot compute this on a platform ('cpu', 'gpu', ...), or None."""
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[-1]
    sort = (capability() if platform == "gpu" else None) or 8.0
    widest = 256 if sort >= 9 else 128
    fits = H in range(8, widest + 1, 8)
    dtypes = {x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}
    reasons = {
        f"it runs on NVIDIA GPUs, and this is a {platform}": platform != "gpu",
        f"it needs compute capability 8.0, and this GPU has {sort}": sort < 8,
        f"it computes in bfloat16 or float16, and this is {q_BTNH.dtype}": len(dtypes) > 1
        or q_BTNH.dtype not in (jnp.bfloat16, jnp.float16),
        f"its heads are a multiple of 8 up to {widest} wide, and these {H}": not fits,
        "it would round a bias on the scores to 16 bits": bias_NTS is not None,
        "it has no soft-cap": softcap is not None,
        "it has no sinks": sink_N is not None,
        "it has no place for keys of a cache": not mask.is_plain(),
        f"causal, it takes as many keys as queries, and these are {S} and {T}": mask.causal
        and S != T,
        f"with a mask like this it takes an even number of places, and these are {T} and {S}": (
            not has_own_mask(mask) and (T % 2 or S % 2)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
