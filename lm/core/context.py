"""What every layer is told besides its input: positions, segments, and how to compute."""

import jax
import jax.numpy as jnp
from flax import struct

from lm.core.pipeline import GPIPE, Pipeline

Array = jax.Array


@struct.dataclass
class Context:
    """Facts about one call of a model, the same for all of its layers.

    A caller sets the first group; the model fills in the second on the way down.

    Attributes:
      positions_BT: place of each token in its document, or None for 0..T-1 (counted over the
        non-padding tokens, so padding on the left moves nothing).
      segments_BT: document of each token, from 1; 0 is padding. None: one document, no padding.
        Places attend only within their own segment, and recurrences restart at a new one.
      token_types_BT: sentence ids (BERT), or None.
      source_BS: tokens for the encoder of an encoder-decoder, or None once they are in the state.
      source_segments_BS: as `segments_BT`, for the source.
      causal: whether a place sees only itself and what is before it; None is the model's default.
      deterministic: True switches dropout off.
      adapter_B: (B,) int32, which of several adapters each row uses, -1 for the base alone. None
        where there is one adapter for all rows, or none.
      adapter_dropout: rate of dropout on the input of adapters.
      dtype: name of the dtype that the layers compute in; parameters keep their own.
      cache_length: number of slots of decoding state that a call without a state creates; None
        creates none.
      attention: its backend, 'auto' or a name in `lm.ops.attention.BACKENDS`.
      context_parallel: how it reaches keys on other devices, where a mesh divides the places of a
        row; in `lm.ops.attention.CONTEXT_PARALLEL`.
      sequence_parallel: whether the devices that share heads and feed-forward share the places of
        the residual stream, too.
      remat: what the backward pass recomputes in each repeat of the stack: 'none', 'dots' (all
        but the products of projections), 'full', or 'offload' (as 'dots', with those products kept
        in the host's memory).
      unroll: how many repeats of the stack stand in one iteration of its scan; None chooses.
      pipeline: how rows pass through the stack where the mesh has several stages.

      slot: () int32, the decoding-state slot of the first new token.
      segments_BS: (B, S) int32 segments of all the keys that this call may look at.
      bias_NTS: bias on attention scores shared by all layers (T5), or None.
      memory_BSD: output of the encoder, which cross attention reads.
    """

    positions_BT: Array | None = None
    segments_BT: Array | None = None
    token_types_BT: Array | None = None
    source_BS: Array | None = None
    source_segments_BS: Array | None = None
    adapter_B: Array | None = None

    causal: bool | None = struct.field(pytree_node=False, default=None)
    deterministic: bool = struct.field(pytree_node=False, default=True)
    adapter_dropout: float = struct.field(pytree_node=False, default=0.0)
    dtype: str = struct.field(pytree_node=False, default="float32")
    cache_length: int | None = struct.field(pytree_node=False, default=None)
    cache_dtype: str | None = struct.field(pytree_node=False, default=None)
    attention: str = struct.field(pytree_node=False, default="auto")
    context_parallel: str = struct.field(pytree_node=False, default="ulysses")
    sequence_parallel: bool = struct.field(pytree_node=False, default=False)
    remat: str = struct.field(pytree_node=False, default="none")
    unroll: int | None = struct.field(pytree_node=False, default=None)
    pipeline: Pipeline = struct.field(pytree_node=False, default=GPIPE)

    slot: Array | None = None
    segments_BS: Array | None = None
    bias_NTS: Array | None = None
    memory_BSD: Array | None = None


def positions_of(segments_BT: Array) -> Array:
    """Counts the places of each segment from 0, wherever in the row it starts.

    Args:
      segments_BT: (B, T) integers; 0 is padding.

    Returns:
      (B, T) int32. Padding gets 0.
    """
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], 1
    )
    first_BT = jax.lax.cummax(jnp.where(starts_BT, index_T, 0), axis=1)
    return jnp.where(segments_BT == 0, 0, index_T - first_BT)
