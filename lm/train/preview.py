"""One example as the model reads it, with the tokens that train set off from the others."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lm.core.batch import Batch

Runs = list[tuple[str, bool]]


def first_example(batch: Batch, tokenizer: Any) -> Runs:
    """Returns the first document of a batch as runs of (text, whether it trains), in order.

    The list is empty where every token counts alike.
    """
    tokens, targets, weights, segments = (
        np.asarray(field).reshape(-1, batch.tokens.shape[-1])
        for field in (batch.tokens, batch.targets, batch.weights, batch.segments)
    )
    if (weights[segments != 0] == 1).all():
        return []
    row = int(np.argmax((segments != 0).any(axis=1)))
    places = np.flatnonzero(segments[row] == 1)
    ids, trains = tokens[row][places], weights[row][places] > 0
    if np.array_equal(ids[1:], targets[row][places][:-1]):  # Weights are those of the next token.
        ids = np.append(ids, targets[row][places][-1])
        trains = np.insert(trains, 0, False)
    runs = itertools.groupby(zip(ids.tolist(), trains.tolist()), key=lambda pair: pair[1])
    return [(text_of([token for token, _ in run], tokenizer), flag) for flag, run in runs]


def text_of(ids: list[int], tokenizer: Any) -> str:
    """Returns ids as text, special tokens included where the tokenizer can spell them."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    has_specials = hasattr(tokenizer, "specials")
    return tokenizer.decode(ids, special=True) if has_specials else tokenizer.decode(ids)


def show_example(batch: Batch, tokenizer: Any, echo: Callable[[str], None]) -> None:
    """Prints the first document of a batch, unless every token counts alike.

    Tokens that train are green on a terminal, and in [brackets] elsewhere.
    """
    runs = first_example(batch, tokenizer)
    if not runs:
        return
    if sys.stdout.isatty() and echo is print:
        echo("an example, of which the green tokens train:")
        Console().print(Text.assemble(*((text, "green" if flag else "") for text, flag in runs)))
        return
    shown = "".join(f"[{text}]" if flag else text for text, flag in runs)
    echo(f"an example, of which the tokens in [brackets] train:\n{shown}")
