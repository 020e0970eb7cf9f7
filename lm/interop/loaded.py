"""A model with its parameters and tokenizer: what `lm.load` returns and notebooks hold."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.models.adapter_rows import Adapters, choose
from lm.models.encdec import EncoderDecoder

Array = jax.Array


@dataclasses.dataclass
class Loaded:
    """A model ready to use.

    Attributes:
      model: the composition, a value.
      params: its parameters, a nested dict.
      tokenizer: encodes and decodes text, or None where the source carries none.
      dtype: name of the dtype that it computes in.
      name: where it came from.
      labels: names of a classifier's labels, in the order of its logits; () where nobody said.
    """

    model: nn.Module
    params: Any
    tokenizer: Any = None
    dtype: str = "float32"
    name: str = ""
    labels: tuple[str, ...] = ()

    def logits(
        self,
        tokens: Any,
        *,
        mask: Any = None,
        targets: Any = None,
        token_types: Any = None,
        adapters: Adapters = None,
    ) -> Array:
        """Returns fp32 logits of every place.

        Args:
          tokens: (B, T) or (T,) token ids; the source, for an encoder-decoder.
          mask: of the shape of `tokens`, 0 or False where it is padding; on either side.
          targets: (B, U) decoder inputs of an encoder-decoder, unshifted, start token included.
          token_types: sentence ids of the shape of `tokens` (BERT).
          adapters: which of several adapters each row uses, -1 for the base alone: one number, or
            one per row.

        Returns:
          (B, T, V), or (B, U, V) for an encoder-decoder.

        Raises:
          ValueError: for ids outside the vocabulary, shapes that differ, or targets that are
            missing or not asked for; if there is no adapter of a number, or several and none is
            chosen.
        """
        tokens_BT = self._ids(tokens, "tokens")
        segments = None if mask is None else self._like(mask, tokens_BT, "mask").astype(np.int32)
        if token_types is not None:
            token_types = self._like(token_types, tokens_BT, "token_types")
        adapter_B = choose(self.params, adapters, len(tokens_BT))
        common = dict(adapter_B=adapter_B, dtype=self.dtype)
        ctx = Context(segments_BT=segments, token_types_BT=token_types, **common)
        if isinstance(self.model, EncoderDecoder):
            if targets is None:
                raise ValueError(
                    "this is an encoder-decoder: give its decoder inputs too, "
                    "logits(source, targets=...), start token included"
                )
            targets_BU = self._ids(targets, "targets")
            if len(targets_BU) != len(tokens_BT):
                raise ValueError(f"{len(tokens_BT)} sources, but {len(targets_BU)} targets")
            ctx = Context(source_BS=tokens_BT, source_segments_BS=segments, **common)
            tokens_BT = targets_BU
        elif targets is not None:
            raise ValueError("only an encoder-decoder takes targets, and this model is none")
        return _logits(self.model, self.params, tokens_BT, ctx)

    def _ids(self, ids: Any, what: str) -> np.ndarray:
        ids = np.atleast_2d(np.asarray(ids))
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{what} must be integer ids of shape (batch, length), not {ids.dtype} {ids.shape}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.model.vocab_size:
            raise ValueError(
                f"{what} hold id {low if low < 0 else high}, "
                f"outside the vocabulary of 0..{self.model.vocab_size - 1}"
            )
        return ids.astype(np.int32)

    def _like(self, array: Any, tokens_BT: np.ndarray, what: str) -> np.ndarray:
        array = np.atleast_2d(np.asarray(array))
        if array.shape != tokens_BT.shape:
            raise ValueError(f"{what} has shape {array.shape}, but tokens {tokens_BT.shape}")
        return array.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: nn.Module, params: Any, tokens_BT: Array, ctx: Context) -> Array:
    return model.apply({"params": params}, tokens_BT, ctx)[0].astype(jnp.float32)
