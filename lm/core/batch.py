"""What the data pipeline hands to the train step."""

from typing import Any

from flax import struct

Array = Any  # a numpy array on the host, a jax array on a device


@struct.dataclass
class Batch:
    """One batch of fixed shape; a pytree, so it shards, slices and donates like any other.

    Attributes:
      tokens: (B, T) int32, what the model reads (a decoder's inputs, already shifted).
      targets: (B, T) int32, what it is to predict at each place.
      weights: (B, T) float32, how much each prediction counts; 0 drops it from the loss.
      segments: (B, T) int32, which document a place belongs to, counted from 1; 0 is padding.
        Places attend only within their own segment.
      positions: (B, T) int32, the place within its document, or None for 0..T-1.
      token_types: (B, T) int32 sentence ids (BERT), or None.
      source: (B, S) int32, what an encoder-decoder's encoder reads, or None.
      source_segments: (B, S) int32, as `segments`, for the source; or None.
      labels: (B,) int32 class labels or the numbers of the right choices, (B, 2) int32 first and
        last place of a span; or None.

    Where each row has C choices, `tokens` and what belongs to them are (B, C, T).
    """

    tokens: Array
    targets: Array
    weights: Array
    segments: Array
    positions: Array | None = None
    token_types: Array | None = None
    source: Array | None = None
    source_segments: Array | None = None
    labels: Array | None = None


def split_rows(x: Array, parts: int) -> Array:
    """Returns (B, ...) as (parts, B / parts, ...), part p made of rows p, p + parts, ...

    Rows are dealt out in turn so that a batch divided over devices stays where it is.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
