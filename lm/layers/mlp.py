"""Position-wise feed-forward layers."""

from functools import partial

import flax.linen as nn
import jax

from lm.core.context import Context
from lm.core.init import ZEROS, Init, VarianceScaling
from lm.core.mesh import lay_features
from lm.core.part import Part
from lm.layers.projection import Projection
from lm.ops.activation import activate

Array = jax.Array


def inner(x_BTF: Array, ctx: Context) -> Array:
    """Returns what is between two projections, divided as their kernels are.

    Where the stream is divided by places, a compiler would else be free to divide this so, too.
    """
    return lay_features(x_BTF) if ctx.sequence_parallel else x_BTF


class MLP(Part):
    """down(activation(up(x))).

    Attributes:
      hidden: F, the width between the two projections.
      activation: a name in `lm.ops.activation`; 'gelu' is the exact one, through erf.
      bias: whether both projections have a bias.
      kernel_init, bias_init: initializers of both.
      down_init: initializer of the last kernel, where it differs.
    """

    hidden: int
    activation: str = "gelu"
    bias: bool = True
    kernel_init: Init = VarianceScaling()
    bias_init: Init = ZEROS
    down_init: Init | None = None

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        project = partial(Projection, bias=self.bias, bias_init=self.bias_init)
        h_BTF = project((self.hidden,), ("embed", "mlp"), kernel_init=self.kernel_init, name="up")(
            x_BTD, ctx
        )
        h_BTF = activate(self.activation, inner(h_BTF, ctx))
        down = project(
            x_BTD.shape[-1:],
            ("mlp", "embed"),
            kernel_init=self.down_init or self.kernel_init,
            name="down",
        )
        return down(h_BTF, ctx), state


class GLU(Part):
    """down(activation(gate(x)) * up(x)) (Shazeer, 2020): SwiGLU with 'silu', GEGLU with 'gelu'.

    Attributes: as of `MLP`.
    """

    hidden: int
    activation: str = "silu"
    bias: bool = False
    kernel_init: Init = VarianceScaling()
    down_init: Init | None = None

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        project = partial(Projection, bias=self.bias)
        inward = partial(project, (self.hidden,), ("embed", "mlp"), kernel_init=self.kernel_init)
        gate_BTF = inner(inward(name="gate")(x_BTD, ctx), ctx)
        h_BTF = activate(self.activation, gate_BTF, inner(inward(name="up")(x_BTD, ctx), ctx))
        down = project(
            x_BTD.shape[-1:],
            ("mlp", "embed"),
            kernel_init=self.down_init or self.kernel_init,
            name="down",
        )
        return down(h_BTF, ctx), state
