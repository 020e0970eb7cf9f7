"""How layers are wired into the residual stream: wiring is a part too."""

import flax.linen as nn
import jax

from lm.core.context import Context
from lm.core.mesh import STREAM_AXES, gather_places, lay_places
from lm.core.part import Part
from lm.layers.dropout import Dropout

Array = jax.Array


class PreNorm(Part):
    """x + dropout(layer(norm(x))), as in GPT-2 and Llama (Xiong et al., 2020)."""

    layer: nn.Module
    norm: nn.Module
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        y_BTD, state = self.layer(gathered(self.norm(x_BTD), ctx), ctx, state)
        return x_BTD + Dropout(self.dropout)(stream(y_BTD, ctx), ctx), state


class PostNorm(Part):
    """norm(x + dropout(layer(x))), as in the transformer of 2017 and BERT."""

    layer: nn.Module
    norm: nn.Module
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        y_BTD, state = self.layer(gathered(x_BTD, ctx), ctx, state)
        return self.norm(x_BTD + Dropout(self.dropout)(stream(y_BTD, ctx), ctx)), state


def stream(x_BTD: Array, ctx: Context) -> Array:
    """Returns the residual stream, its places divided as the mesh and `ctx` have it.

    With `ctx.sequence_parallel` the sum over devices that a layer ends with is scattered over its
    places, and gathered before the next layer (Korthikanti et al., 2022).
    """
    return lay_places(x_BTD, STREAM_AXES if ctx.sequence_parallel else STREAM_AXES[:1])


def gathered(x_BTD: Array, ctx: Context) -> Array:
    """Returns what of `stream` a layer reads: all places of the devices that share its heads."""
    return gather_places(x_BTD) if ctx.sequence_parallel else x_BTD


class Block(Part):
    """A mixer over places, then optionally cross attention, then optionally a feed-forward.

    Attributes:
      mixer, cross, mlp: wired layers (`PreNorm(...)`, `PostNorm(...)`), or None.
    """

    mixer: nn.Module
    mlp: nn.Module | None = None
    cross: nn.Module | None = None

    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        new_state = {}
        for name in ("mixer", "cross", "mlp"):
            layer = getattr(self, name)
            if layer is not None:
                old = None if state is None else state.get(name)
                x_BTD, new = layer(x_BTD, ctx, old)
                if new is not None:
                    new_state[name] = new
        return x_BTD, new_state or None
