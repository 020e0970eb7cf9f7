"""What is asked of a model: settings, keys, stop tokens and texts, checked and made into arrays."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.chat import Messages
from lm.infer.decoding import KEY_TYPE
from lm.infer.rows import Rows, encode, encode_source
from lm.models.encdec import EncoderDecoder
from lm.ops.sampling import Sampling

Setting = float | Sequence[float]
Text = str | Messages
STOP_ROOM = 8  # Stop tokens are padded to a multiple of this, so that few shapes are compiled.


RANGES = {
    "temperature": (lambda x: x >= 0, "0 or more"),
    "top_k": (lambda x: x >= 0, "0 (off) or more"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0, and at most 1 (off)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 (off) to 1"),
    "repetition_penalty": (lambda x: x > 0, "above 0, where 1 is off"),
}


def sampling_rows(sampling: Sampling, count: int, padded: int) -> Sampling:
    """Returns the settings as arrays of one number per row, after checking them."""
    arrays = {}
    for name, (accepts, words) in RANGES.items():
        setting = getattr(sampling, name)
        values = np.asarray(setting, np.int32 if name == "top_k" else np.float32)
        if values.ndim and values.shape != (count,):
            raise ValueError(f"{name} has shape {values.shape}: give one number, or {count}")
        if not np.all(accepts(values)):
            raise ValueError(f"{name} must be {words}, not {setting}")
        arrays[name] = np.resize(values, padded)
    return Sampling(**arrays)


def key_rows(seed: int, keys: jax.Array | None, count: int, padded: int) -> Any:
    """Returns the (padded, 2) data of one key per row: those given, or made of a seed."""
    if keys is None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, not {seed}")
        return _fold_rows(np.uint32(seed), padded)
    if keys.shape != (count,):
        raise ValueError(f"keys have shape {keys.shape}: give {count}, one for each prompt")
    data = np.asarray(jax.random.key_data(keys))
    return np.pad(data, ((0, padded - count), (0, 0)))


@partial(jax.jit, static_argnames="count")
def _fold_rows(seed: jax.Array, count: int) -> jax.Array:
    key = jax.random.key(seed, impl=KEY_TYPE)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
    return jax.random.key_data(keys)


CACHE_DTYPES = ("float32", "bfloat16", "int8")


def check_cache_dtype(name: str | None) -> None:
    """Raises a ValueError for a dtype that a cache of keys and values cannot have."""
    if name is not None and name not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is one of {', '.join(CACHE_DTYPES)}, not {name!r}")


def stop_rows(stop_ids: Sequence[int]) -> np.ndarray:
    """Returns stop tokens as an array of few shapes; -1 is none."""
    return np.array([*stop_ids] + [-1] * (-len(stop_ids) % STOP_ROOM or STOP_ROOM), np.int32)


def stops(tokenizer: Any, stop_ids: Sequence[int], prompts: Sequence[Text]) -> list[int]:
    """Returns what ends a text: `stop_ids`, the end token, and of a reply the end of its turn."""
    ends = [tokenizer.eos_id]
    if not all(isinstance(prompt, str) for prompt in prompts):
        ends.append(getattr(tokenizer, "end_of_turn", None))
    return [*stop_ids, *(token for token in dict.fromkeys(ends) if token is not None)]


def encoded(loaded: Any, texts: Sequence[Text]) -> dict[str, Rows | None]:
    """Returns the ids of texts as the prompts, or for an encoder-decoder the source, of a call."""
    if isinstance(loaded.model, EncoderDecoder):
        return {"prompts": None, "source": [encode_source(loaded.tokenizer, t) for t in texts]}
    return {"prompts": [encode(loaded.tokenizer, t) for t in texts], "source": None}
