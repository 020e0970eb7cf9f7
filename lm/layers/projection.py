"""Weight matrices: every product of an activation with a kernel goes through `contract`."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.core.context import Context
from lm.core.init import ZEROS, Init, VarianceScaling
from lm.core.mesh import target_platform
from lm.core.part import Part
from lm.layers.dropout import Dropout
from lm.ops.product import product
from lm.ops.quantize import KINDS, dequantize
from lm.ops.sums import spread

Array = jax.Array

# A kernel's leaf that stands in its place with outputs first, (O, I) (`lm.models.kernels.turn`).
TURNED = "kernel_turned"
# What remat may keep of a layer (`lm.models.stack`), in the compute dtype.
PRODUCT = "product"


def contract(x: Array, kernel: Array, num_in: int = 1) -> Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`.

    Operands of a lower precision are multiplied as they are and summed in fp32, forwards and
    backwards; the result has their dtype.
    """
    matrix = kernel.reshape(math.prod(kernel.shape[:num_in]), -1)
    flat = x.reshape(*x.shape[: x.ndim - num_in], matrix.shape[0])
    # One row of fp32 on a CPU is for `_one_row`, where the kernel is reshaped.
    alone = x.dtype == jnp.float32 and kernel.ndim > 2 and flat.size == len(matrix)
    if alone and target_platform() == "cpu":
        y = _one_row("...i,io->...o", flat, matrix)
    else:
        rows = "abcdefgh"[: flat.ndim - 1]
        y = product(f"{rows}i,io->{rows}o", flat, matrix).astype(x.dtype)
    return y.reshape(*y.shape[:-1], *kernel.shape[num_in:])


def contract_turned(x: Array, turned: Array, num_in: int, features: tuple[int, ...]) -> Array:
    """Returns what `contract` does, by a kernel that is turned; `features` are its outputs."""
    flat = x.reshape(*x.shape[: x.ndim - num_in], turned.shape[1])
    rows = "abcdefgh"[: flat.ndim - 1]
    alone = x.dtype == jnp.float32 and flat.size == turned.shape[1]
    if alone and target_platform() == "cpu":
        y = _one_row("...i,oi->...o", flat, turned)
    else:
        y = product(f"{rows}i,oi->{rows}o", flat, turned).astype(x.dtype)
    return y.reshape(*y.shape[:-1], *features)


def _one_row(letters: str, x: Array, matrix: Array) -> Array:
    """The product of a single row and a matrix that is a reshaped kernel, or a turned one.

    XLA's CPU backend would fuse the reshape into the product, and with it the norm before it, and
    compute all of that again for each output: 6 times slower for GPT-2's (768, 12, 64). It fuses
    nothing into a branch, which this one always takes: with NaN in x all outputs are NaN.
    """
    sound = x.reshape(-1)[0] == x.reshape(-1)[0]
    multiply = partial(jnp.einsum, letters)
    shape = jax.eval_shape(multiply, x, matrix).shape
    return jax.lax.cond(
        sound, multiply, lambda x, matrix: jnp.full(shape, jnp.nan, x.dtype), x, matrix
    )


@partial(jax.checkpoint, static_argnums=(3, 4))
def contract_quantized(x: Array, codes: Array, scales: Array, kind: str, num_in: int) -> Array:
    """Returns `contract` of `x` with a quantized kernel.

    The backward pass dequantizes again what it multiplies by. Otherwise it would keep the whole
    base dequantized, one kernel for each layer, from the forward pass on.

    Args:
      x: (..., inputs...).
      codes, scales, kind: as `lm.ops.quantize.quantize` returns them.
      num_in: how many of the kernel's dimensions are inputs.
    """
    return contract(x, dequantize(codes, scales, kind, num_in - 1).astype(x.dtype), num_in)


class Projection(Part):
    """y = x kernel + bias, over one or several input and output dimensions.

    An adapter is leaves beside the kernel (`lm.models.adapters` puts them there), and is used
    where it is: `lora_a` (inputs..., R), `lora_b` (R, outputs...) and the constant `lora_scale` ()
    make it x kernel + scale (x a) b + bias (Hu et al., 2022). `lora_m` (outputs...), the lengths of
    the columns, makes the columns of kernel + scale a b that long (DoRA; Liu et al., 2024). Several
    adapters have a further first dimension, and `ctx.adapter_B` says which row uses which.

    A quantized kernel likewise is leaves in its place (`lm.models.quantized` puts them there):
    codes `kernel_int8`, `kernel_int4` or `kernel_nf4`, and `kernel_scales`. So does one that is
    turned for decoding, `kernel_turned`.

    Attributes:
      features: output dimensions, such as (num_heads, head_dim).
      axes: logical axis of every kernel dimension, inputs first.
      num_in: how many of the last dimensions of `x` are contracted.
      bias: whether there is a bias of shape `features`.
      kernel_init, bias_init: initializers.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    num_in: int = 1
    bias: bool = False
    kernel_init: Init = VarianceScaling()
    bias_init: Init = ZEROS

    @nn.compact
    def __call__(self, x: Array, ctx: Context) -> Array:
        """Returns (..., *features) in the compute dtype of `ctx`."""
        shape = x.shape[x.ndim - self.num_in :] + self.features
        fan_in = math.prod(shape[: self.num_in])
        x = x.astype(ctx.dtype)
        if kind := next((k for k in KINDS if self.has_variable("params", f"kernel_{k}")), None):
            codes = self.get_variable("params", f"kernel_{kind}")
            scales = self.get_variable("params", "kernel_scales")
            y = contract_quantized(x, codes, scales, kind, self.num_in)
            kernel = partial(dequantize, codes, scales, kind, self.num_in - 1)
        elif self.has_variable("params", TURNED):
            turned = self.get_variable("params", TURNED)
            y = contract_turned(x, turned.astype(ctx.dtype), self.num_in, self.features)
            kernel = partial(jnp.reshape, turned.T, shape)
        else:
            plain = self.param(
                "kernel",
                nn.with_logical_partitioning(self.kernel_init, self.axes),
                shape,
                jnp.float32,
                fan_in,
            )
            y = contract(x, plain.astype(ctx.dtype), self.num_in)
            kernel = partial(jnp.asarray, plain)
        y = checkpoint_name(y, PRODUCT)
        if self.has_variable("params", "lora_a"):
            y = self.adapt(x, y, kernel, ctx)
        if self.bias:
            axes = self.axes[self.num_in :]
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(self.bias_init, axes),
                self.features,
                jnp.float32,
                fan_in,
            )
            y += spread(bias, y)
        return y

    def adapt(self, x: Array, y: Array, kernel: Callable[[], Array], ctx: Context) -> Array:
        """Returns what `y`, x kernel(), is with the adapter or adapters beside the kernel.

        Raises:
          ValueError: if there are several, and nothing says which row uses which.
        """
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        scale = jax.lax.stop_gradient(scale)
        gain = None
        if self.has_variable("params", "lora_m"):
            gain = self.get_variable("params", "lora_m") / jax.lax.stop_gradient(
                column_norms(kernel(), a, b, scale)
            )
        x = Dropout(ctx.adapter_dropout, name="lora_dropout")(x, ctx)
        if ctx.adapter_B is None:
            if scale.ndim:
                raise ValueError(
                    f"these parameters hold {len(scale)} adapters: say in adapter_B which one each "
                    "row uses, or select one of them"
                )
            low = contract(x, a.astype(ctx.dtype), self.num_in)
            y += contract(low, b.astype(ctx.dtype)) * scale.astype(ctx.dtype)
            return y if gain is None else y * gain.astype(ctx.dtype)
        if not scale.ndim:
            a, b, scale = a[None], b[None], scale[None]
            gain = None if gain is None else gain[None]
        rows, alone_B = len(x), ctx.adapter_B < 0
        ids_B = jnp.maximum(ctx.adapter_B, 0)

        def pick(leaf: Array, *shape: int) -> Array:
            # A number without an adapter makes NaN of its row; jax would take the last adapter.
            return jnp.take(leaf, ids_B, axis=0, mode="fill").reshape(rows, *shape)

        fan_in = math.prod(x.shape[x.ndim - self.num_in :])
        a_BIR = pick(a, fan_in, a.shape[-1]).astype(ctx.dtype)
        b_BRO = pick(b, a.shape[-1], -1).astype(ctx.dtype)
        low = product("bti,bir->btr", x.reshape(rows, -1, fan_in), a_BIR).astype(x.dtype)
        more = product("btr,bro->bto", low, b_BRO).astype(x.dtype)
        scale_B11 = jnp.where(alone_B, 0.0, pick(scale)).astype(ctx.dtype)[:, None, None]
        flat = y.reshape(more.shape) + more * scale_B11
        if gain is not None:
            flat *= jnp.where(alone_B[:, None, None], 1.0, pick(gain, 1, -1)).astype(ctx.dtype)
        return flat.reshape(y.shape)


def column_norms(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """Returns the lengths of the columns of kernel + scale a b, in fp32, without making that sum.

    |w + s B a|^2 = |w|^2 + 2 s b.(A w) + s^2 b.(A A^T b), for each column w and its b.

    Args:
      kernel: (inputs..., outputs...).
      a, b, scale: (inputs..., R), (R, outputs...) and (), or with a dimension of adapters before.

    Returns:
      (outputs...), or (adapters, outputs...).
    """
    if scale.ndim:
        return jax.vmap(column_norms, (None, 0, 0, 0))(kernel, a, b, scale)
    rank = a.shape[-1]
    a_IR, b_RO = a.astype(jnp.float32).reshape(-1, rank), b.astype(jnp.float32).reshape(rank, -1)
    w_IO = kernel.astype(jnp.float32).reshape(len(a_IR), -1)
    mixed_O = jnp.sum(b_RO * (a_IR.T @ w_IO), axis=0)
    own_O = jnp.sum(b_RO * (a_IR.T @ a_IR @ b_RO), axis=0)
    squared_O = jnp.sum(w_IO**2, axis=0) + 2 * scale * mixed_O + scale**2 * own_O
    return jnp.sqrt(squared_O).reshape(b.shape[1:])
