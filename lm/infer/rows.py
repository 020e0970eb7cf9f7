"""Lists of token ids of any lengths become arrays of few shapes; ids are checked on the way in."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.chat import Messages

Rows = Sequence[Sequence[int]]


def bucket(count: int, least: int = 1) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `count` and `least`.

    Shapes rounded up to it bound the number of compilations by the logarithm of the length, and
    waste a third of the places at most.
    """
    count = max(count, least)
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 else power


def check(rows: Rows, model: Any, what: str = "prompt", room: int = 0) -> None:
    """Refuses rows that the model cannot read and follow with `room` more tokens.

    Raises:
      ValueError: if there are no rows, or one is empty, too long, or has an id out of range, which
        JAX would silently clamp.
    """
    if len(rows) == 0:
        raise ValueError(f"there is no {what}: give at least one")
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"{what} {index} is empty: give it at least one token")
        for token in (min(row), max(row)):
            if not 0 <= token < model.vocab_size:
                raise ValueError(
                    f"{what} {index} has the token id {token}, and this model knows 0 to "
                    f"{model.vocab_size - 1}: encode it with the model's own tokenizer"
                )
        if model.max_length is not None and len(row) + room > model.max_length:
            more = f" and {room} more were asked for" if room else ""
            raise ValueError(
                f"{what} {index} has {len(row)} tokens{more}, and this model has positions for "
                f"{model.max_length}: shorten the {what}" + (" or ask for fewer" if room else "")
            )


def pack(
    rows: Rows, width: int, count: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows to (count, width) int32 tokens and segments (1, and 0 for padding).

    Rows beyond `rows` hold one token, so that no row is without any. `left` pads on the left.
    """
    tokens = np.zeros((count, width), np.int32)
    segments = np.zeros((count, width), np.int32)
    for index in range(count):
        row = rows[index] if index < len(rows) else (0,)
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, place] = row
        segments[index, place] = 1
    return tokens, segments


def width_of(rows: Rows, model: Any, least: int = 16) -> int:
    """Returns the bucket of the longest row, cut to the positions that the model has."""
    width = bucket(max(len(row) for row in rows), least)
    return width if model.max_length is None else min(width, model.max_length)


def encode(tokenizer: Any, text: str | Messages) -> list[int]:
    """Returns the ids of a text as models meet it in training: after bos, or eos if there is none.

    Where the tokenizer has neither, or says that texts do not start with one, the ids of the text
    stand alone; but not if there are none. A conversation is encoded by the chat template.

    Raises:
      ValueError: for a conversation, if there is no chat template, or it refuses the messages.
    """
    if not isinstance(text, str):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("this model has no chat template: give it text, not a conversation")
        return tokenizer.encode_chat(text)
    ids = tokenizer.encode(text)
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None or (ids and not getattr(tokenizer, "starts", True)):
        return ids
    return [start, *ids]


def encode_both_ends(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text as a bidirectional model meets it, between bos and eos."""
    return [*encode(tokenizer, text), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def encode_source(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text for an encoder, before the end token where there is one."""
    return [*tokenizer.encode(text), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
