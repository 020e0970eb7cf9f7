"""Poolers: from one vector per place to one vector per sequence, padding left out.

Each is called as `pooler(x_BTD, ctx)` and returns (B, D) or, concatenated, (B, n D). Padding is
where `ctx.segments_BT` is 0; a row of nothing but padding gives numbers of the usual size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import Init, VarianceScaling
from lm.core.part import Part
from lm.layers.dropout import Dropout
from lm.layers.projection import Projection
from lm.ops.activation import activate

Array = jax.Array


class FirstToken(Part):
    """The first place of each row that is not padding."""

    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        return _take(x_BTD, _real(x_BTD, ctx).argmax(axis=1))


class LastToken(Part):
    """The last place of each row that is not padding."""

    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        index_T = jnp.arange(x_BTD.shape[1])
        return _take(x_BTD, (index_T * _real(x_BTD, ctx)).argmax(axis=1))


class MeanPool(Part):
    """The mean over the places that are not padding, summed in fp32."""

    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        real_BT = _real(x_BTD, ctx)
        total_BD = jnp.where(real_BT[..., None], x_BTD, 0).sum(axis=1, dtype=jnp.float32)
        mean_BD = total_BD / jnp.maximum(real_BT.sum(axis=1), 1)[:, None]
        return mean_BD.astype(x_BTD.dtype)


class MaxPool(Part):
    """The largest value of each feature over the places that are not padding."""

    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        real_BT1 = _real(x_BTD, ctx)[..., None]
        lowest = jnp.finfo(x_BTD.dtype).min
        largest_BD = jnp.where(real_BT1, x_BTD, lowest).max(axis=1)
        return jnp.where(real_BT1.any(axis=1), largest_BD, 0)


class Concat(Part):
    """Several poolers side by side, (B, n D).

    The default is [last; max; mean], the concat pooling of Howard and Ruder (2018).

    Attributes:
      poolers: in order.
    """

    poolers: tuple[nn.Module, ...] = (LastToken(), MaxPool(), MeanPool())

    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        return jnp.concatenate([pooler(x_BTD, ctx) for pooler in self.poolers], axis=-1)


class Dense(Part):
    """activation(dense(pool(x))): what stands between a pooler and the labels.

    Attributes:
      pool: any other pooler.
      features: of the dense layer; None keeps those of the pooled vector.
      activation: a name in `lm.ops.activation`.
      dropout: rate before the dense layer.
      kernel_init: initializer.
    """

    pool: nn.Module
    features: int | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    kernel_init: Init = VarianceScaling()

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context) -> Array:
        pooled_BD = Dropout(self.dropout)(self.pool(x_BTD, ctx), ctx)
        dense = Projection(
            (self.features or pooled_BD.shape[-1],),
            ("embed", "embed_out"),
            bias=True,
            kernel_init=self.kernel_init,
            name="dense",
        )
        return activate(self.activation, dense(pooled_BD, ctx))


def _real(x_BTD: Array, ctx: Context) -> Array:
    if ctx.segments_BT is None:
        return jnp.ones(x_BTD.shape[:2], bool)
    return ctx.segments_BT != 0


def _take(x_BTD: Array, index_B: Array) -> Array:
    return jnp.take_along_axis(x_BTD, index_B[:, None, None], axis=1)[:, 0]
