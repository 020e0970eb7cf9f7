"""Mamba's mixer: a gated selective state-space model (Gu and Dao, 2023)."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.context import Context
from lm.core.init import ONES, ZEROS, Init, VarianceScaling
from lm.core.part import Part
from lm.layers.cache import places
from lm.layers.projection import Projection
from lm.ops.activation import activate
from lm.ops.conv import causal_conv, continue_conv
from lm.ops.recurrence import restarts, selective_scan

Array = jax.Array

TORCH_LINEAR = VarianceScaling(1 / 3, "in", "uniform")


@dataclasses.dataclass(frozen=True)
class LogRange:
    """Fills every row with log(1), log(2), ...: the decay rates of S4D-real (Gu et al., 2022)."""

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


@dataclasses.dataclass(frozen=True)
class StepSize:
    """Draws what softplus maps to step sizes that are log-uniform in [low, high]."""

    low: float = 1e-3
    high: float = 0.1

    def __call__(self, key, shape, dtype=jnp.float32, fan_in: int = 1):
        log_dt = jax.random.uniform(key, shape, dtype, math.log(self.low), math.log(self.high))
        dt = jnp.exp(log_dt)
        return dt + jnp.log(-jnp.expm1(-dt))


class Mamba(Part):
    """out(silu(gate(x)) * scan(silu(conv(up(x))))), with input-dependent dt, B and C in the scan.

    Its decoding state is {'conv': the last K-1 inputs of the convolution, (B, K-1, F) in the
    compute dtype, 'ssm': (B, P, F) fp32}, whatever the length. Padding leaves both alone.

    Attributes:
      inner: F, usually 2 D.
      state_size: P, states per feature.
      conv_width: K, places that the convolution sees.
      dt_rank: R, rank of the map from features to step sizes.
      bias: whether the projections in and out have biases.
      conv_bias: whether the convolution has one.
      kernel_init, out_init: initializers of the projections; `out_init` None is `kernel_init`.
      form, chunk: how the recurrence is computed; see `selective_scan`.
    """

    inner: int
    state_size: int = 16
    conv_width: int = 4
    dt_rank: int = 1
    bias: bool = False
    conv_bias: bool = True
    kernel_init: Init = TORCH_LINEAR
    out_init: Init | None = None
    form: str | None = None
    chunk: int = 64

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        """Returns (B, T, D) in the compute dtype and the new decoding state, or None.

        Raises:
          ValueError: if `ctx.causal` is False, since a recurrence sees only what is before.
        """
        if ctx.causal is False:
            raise ValueError(
                "Mamba is a recurrence and sees only what is before each place: use it in a "
                "causal model, or a mixer such as Attention for causal=False"
            )
        project = partial(Projection, (self.inner,), kernel_init=self.kernel_init, bias=self.bias)
        up_BTF = project(("embed", "mlp"), name="up")(x_BTD, ctx)
        gate_BTF = project(("embed", "mlp"), name="gate")(x_BTD, ctx)
        if state is None and ctx.cache_length is not None:
            rows = x_BTD.shape[0]
            state = {
                "conv": jnp.zeros((rows, self.conv_width - 1, self.inner), up_BTF.dtype),
                "ssm": jnp.zeros((rows, self.state_size, self.inner), jnp.float32),
            }
        before_B = None if state is None else document_before(ctx)
        x_BTF, tail_BKF = self.convolve(up_BTF, ctx, state, before_B)
        x_BTF = activate("silu", x_BTF).astype(ctx.dtype)
        y_BTF, last_BPF = self.scan(x_BTF, ctx, state, before_B)
        y_BTF = activate("silu", gate_BTF, y_BTF.astype(ctx.dtype))
        out = Projection(
            x_BTD.shape[-1:],
            ("mlp", "embed"),
            bias=self.bias,
            kernel_init=self.out_init or self.kernel_init,
            name="out",
        )
        return out(y_BTF, ctx), None if state is None else {"conv": tail_BKF, "ssm": last_BPF}

    def convolve(self, up_BTF: Array, ctx: Context, state, before_B):
        """Returns the (B, T, F) fp32 convolution and the new tail."""
        shape = (self.inner, self.conv_width)
        init = nn.with_logical_partitioning(TORCH_LINEAR, ("mlp", "conv"))
        kernel_FK = self.param("conv_kernel", init, shape, jnp.float32, self.conv_width)
        tail_BKF = None
        if state is None:
            x_BTF = causal_conv(up_BTF, kernel_FK, ctx.segments_BT)
        else:
            x_BTF, tail_BKF = continue_conv(
                up_BTF, kernel_FK, ctx.segments_BT, state["conv"], before_B
            )
        if self.conv_bias:
            init = nn.with_logical_partitioning(ZEROS, ("mlp",))
            x_BTF = jnp.add(x_BTF, self.param("conv_bias", init, (self.inner,)))
        return x_BTF, tail_BKF

    def scan(self, x_BTF: Array, ctx: Context, state, before_B):
        """Returns the (B, T, F) outputs and (B, P, F) last state of the recurrence, fp32."""
        sizes = (self.dt_rank, self.state_size, self.state_size)
        select = Projection(
            (sum(sizes),), ("mlp", "state"), kernel_init=self.kernel_init, name="select"
        )
        ends = (sizes[0], sizes[0] + sizes[1])
        dt_BTR, B_BTP, C_BTP = jnp.split(select(x_BTF, ctx), ends, axis=-1)
        # Step sizes stay fp32: bfloat16 would round their biases by more than a percent.
        dt = Projection(
            (self.inner,),
            ("rank", "mlp"),
            bias=True,
            kernel_init=TORCH_LINEAR,
            bias_init=StepSize(),
            name="dt",
        )
        dt_BTF = jax.nn.softplus(dt(dt_BTR, ctx.replace(dtype="float32")))
        restart_BT = None
        if ctx.segments_BT is not None:
            dt_BTF = jnp.where(ctx.segments_BT[..., None] != 0, dt_BTF, 0.0)
            restart_BT = restarts(ctx.segments_BT, before_B)
        init = nn.with_logical_partitioning(LogRange(), ("mlp", "state"))
        A_log_FP = self.param("A_log", init, (self.inner, self.state_size))
        D_F = self.param("D", nn.with_logical_partitioning(ONES, ("mlp",)), (self.inner,))
        return selective_scan(
            x_BTF,
            dt_BTF,
            -jnp.exp(A_log_FP),
            B_BTP,
            C_BTP,
            D_F,
            initial_BPF=None if state is None else state["ssm"],
            restart_BT=restart_BT,
            form=self.form,
            chunk=self.chunk,
        )


def document_before(ctx: Context) -> Array:
    """Returns the (B,) segment of the newest token before this call, 0 where there is none."""
    assert ctx.segments_BT is not None and ctx.segments_BS is not None, "decoding has segments"
    if ctx.slot is None:
        return jnp.zeros_like(ctx.segments_BT[:, 0])
    index_S = places(ctx.slot + ctx.segments_BT.shape[1], ctx.segments_BS.shape[1])
    old_BS = (ctx.segments_BS != 0) & (index_S < ctx.slot)
    newest_B1 = jnp.argmax(jnp.where(old_BS, index_S, -1), axis=1, keepdims=True)
    found_B = jnp.take_along_axis(ctx.segments_BS, newest_B1, axis=1)[:, 0]
    return jnp.where(old_BS.any(axis=1), found_B, 0)
