"""Multi-head attention as a layer: projections, rotation, the KV cache."""

import flax.linen as nn
import jax
import numpy as np

from lm.core.context import Context
from lm.core.init import ZEROS, Init, VarianceScaling
from lm.core.part import Part
from lm.layers import cache
from lm.layers.cache import Keys
from lm.layers.projection import Projection
from lm.ops.attention import attend
from lm.ops.mask import Mask
from lm.ops.rotary import Rotary

Array = jax.Array


class Attention(Part):
    """Self-attention with N query heads over K key heads (Vaswani et al., 2017).

    Its decoding state is a cache of keys and values (`lm.layers.cache`); with a window, of no more
    slots than that.

    Attributes:
      num_heads: N.
      head_dim: H; N * H need not be D.
      num_kv_heads: K; None means N, 1 is multi-query (Shazeer, 2019), between the two is
        grouped-query attention (Ainslie et al., 2023).
      rotary: rotates queries and keys to their positions, or None.
      window: each place sees only that many nearest ones, or None.
      scale: multiplies the scores; None is 1 / sqrt(H), T5 has 1.
      qkv_bias, out_bias: whether the projections have biases.
      kernel_init, bias_init: initializers.
      q_init, out_init: initializers of those kernels; None is `kernel_init`.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rotary: Rotary | None = None
    window: int | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    kernel_init: Init = VarianceScaling()
    q_init: Init | None = None
    out_init: Init | None = None
    bias_init: Init = ZEROS

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        q_BTNH = self.project("q", self.num_heads)(x_BTD, ctx)
        k_BTKH, v_BTKH = self.keys_values(x_BTD, ctx)
        if self.rotary is not None:
            q_BTNH = self.rotary(q_BTNH, ctx.positions_BT)
            k_BTKH = self.rotary(k_BTKH, ctx.positions_BT)
        index_T = indices(ctx, x_BTD.shape[1])
        keys = Keys(k_BTKH, v_BTKH, index_T)
        if state is not None:
            state, keys = cache.extend(state, keys, ctx.slot, self.window)
        elif ctx.cache_length is not None:
            state = cache.init(keys, ctx.cache_length, self.window, ctx.cache_dtype)
        mask = Mask(
            index_T=index_T,
            index_S=keys.index_S,
            segments_BT=ctx.segments_BT,
            segments_BS=keys.of(ctx.segments_BS),
            causal=bool(ctx.causal),
            window=self.window,
        )
        options = dict(bias_NTS=keys.of(ctx.bias_NTS), scale=self.scale, **way(ctx))
        out_BTNH = attend(q_BTNH, keys.k_BSKH, keys.v_BSKH, mask, **options)
        return self.project_out(out_BTNH, x_BTD.shape[-1], ctx), state

    def project(self, name: str, heads: int) -> Projection:
        return Projection(
            (heads, self.head_dim),
            ("embed", "heads" if name == "q" else "kv_heads", "head_dim"),
            bias=self.qkv_bias,
            kernel_init=(self.q_init if name == "q" else None) or self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    def keys_values(self, x_BSD: Array, ctx: Context) -> tuple[Array, Array]:
        heads = self.num_kv_heads or self.num_heads
        return self.project("k", heads)(x_BSD, ctx), self.project("v", heads)(x_BSD, ctx)

    def project_out(self, out_BTNH: Array, features: int, ctx: Context) -> Array:
        out = Projection(
            (features,),
            ("heads", "head_dim", "embed"),
            num_in=2,
            bias=self.out_bias,
            kernel_init=self.out_init or self.kernel_init,
            bias_init=self.bias_init,
            name="out",
        )
        return out(out_BTNH, ctx)


class CrossAttention(Attention):
    """Attention from a decoder's places to the output of the encoder.

    The keys and values of the memory are computed once, at prefill, and are then its state.
    """

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        q_BTNH = self.project("q", self.num_heads)(x_BTD, ctx)
        if state is not None:
            heads = self.num_kv_heads or self.num_heads
            k_BSKH, v_BSKH = cache.read(state, q_BTNH[:, :, :heads])
        else:
            assert ctx.memory_BSD is not None, "cross attention without an encoder's output"
            k_BSKH, v_BSKH = self.keys_values(ctx.memory_BSD, ctx)
            if ctx.cache_length is not None:
                keys = Keys(k_BSKH, v_BSKH, np.arange(k_BSKH.shape[1]))
                state = cache.init(keys, k_BSKH.shape[1], dtype=ctx.cache_dtype)
        mask = Mask(
            index_T=np.arange(x_BTD.shape[1]),
            index_S=np.arange(k_BSKH.shape[1]),
            segments_BT=ctx.segments_BT,
            segments_BS=ctx.source_segments_BS,
        )
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask, scale=self.scale, **way(ctx))
        return self.project_out(out_BTNH, x_BTD.shape[-1], ctx), state


def way(ctx: Context) -> dict[str, str]:
    """Returns the options of `attend` that say how it is computed."""
    return dict(backend=ctx.attention, context_parallel=ctx.context_parallel)


def indices(ctx: Context, length: int) -> Array | np.ndarray:
    """Returns the (T,) places of the new tokens among the keys: slots of the cache, or 0..T-1."""
    places = np.arange(length, dtype=np.int32)
    return places if ctx.slot is None else places + ctx.slot
