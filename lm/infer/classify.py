"""What a trained classifier says of texts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.context import Context
from lm.data.labelled import between_ends
from lm.infer.rows import bucket, check, pack, width_of
from lm.infer.score import groups, rows_at
from lm.models.tasks import task_of

Array = jax.Array
LENGTH = 512  # Places of a model that has no longest sequence.


class Label(NamedTuple):
    """What is said of one text.

    Attributes:
      label: the likeliest.
      probabilities: of every label, by name.
    """

    label: str
    probabilities: dict[str, float]


def classify(
    loaded: Any,
    texts: Sequence[str],
    *,
    length: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
) -> list[Label]:
    """Returns the label of each text with the probabilities of all, p(y | x) = softmax(logits).

    Args:
      loaded: has `.model`, `.params`, `.tokenizer` and `.labels`; labels without a name are called
        LABEL_0 and so on.
      texts: read between the tokenizer's start and end token.
      length: places that are read of each, the ends included; longer texts are cut. None is as many
        as the model has.
      batch_size: rows that are read at once; rows of similar length go together.
      dtype: the compute dtype.

    Raises:
      ValueError: if the model has no classifier of whole sequences, or there is no text.
    """
    model = loaded.model
    if task_of(model) != "sequence":
        raise ValueError(
            f"{loaded.name or 'this model'} has no classifier of whole texts: train one, as "
            "experiments/bbc_topics.py does"
        )
    rows = between_ends(loaded.tokenizer, texts, length or model.max_length or LENGTH)
    check(rows, model, "text")
    count = model.classifier.features[0]
    unnamed = range(len(loaded.labels), count)
    names = [*loaded.labels, *(f"LABEL_{number}" for number in unnamed)]
    found: list[Label] = [Label("", {})] * len(rows)
    for group in groups(rows, batch_size):
        some = rows_at(rows, group)
        tokens, segments = pack(some, width_of(some, model), bucket(len(group)))
        ctx = Context(segments_BT=segments, dtype=dtype)
        for index, row_C in zip(
            group, np.asarray(_probabilities(loaded.params, tokens, ctx, model))
        ):
            pairs = zip(names, row_C.tolist(), strict=True)
            found[index] = Label(names[int(row_C.argmax())], dict(pairs))
    return found


@partial(jax.jit, static_argnums=3)
def _probabilities(params, tokens_BT: Array, ctx: Context, model) -> Array:
    logits_BC = model.apply({"params": params}, tokens_BT, ctx, method="classify")
    return jax.nn.softmax(logits_BC.astype(jnp.float32), axis=-1)
