"""Heads for tasks: what stands on a body in place of a language model's head.

The tasks are 'sequence' (labels of the whole), 'token' (labels of every place), 'span' (where an
answer begins and ends) and 'choice' (which of several sequences).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from lm.core.init import Init, Normal
from lm.layers.head import Labels, Score, Span
from lm.layers.pool import Dense, FirstToken, LastToken
from lm.models.decoder import Decoder
from lm.models.encdec import EncoderDecoder
from lm.models.foreign import Weight, projection

# Endings of the names of Hugging Face classes.
TASKS = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
    "ForMultipleChoice": "choice",
}
# Parts of a model that a task puts on a body.
HEAD = ("pooler", "classifier")
DECODER_TASKS = {name: task for name, task in TASKS.items() if task != "choice"}


def for_task(
    model: Any,
    task: str,
    num_labels: int = 2,
    *,
    pooler: nn.Module | None = None,
    dropout: float = 0.0,
    kernel_init: Init = Normal(),
) -> Any:
    """Returns a model with the head of a task in place of its own; the body's paths stay.

    Tags of an encoder-decoder are read off its encoder, and the decoder goes, as in T5's class.

    Args:
      model: a `Decoder`, `Encoder` or `EncoderDecoder`.
      task: 'sequence', 'token', 'span' or 'choice'.
      num_labels: of 'sequence' and 'token'.
      pooler: of 'sequence' and 'choice'; None is that of the Hugging Face classes: the last token
        of a decoder, and a dense layer with tanh over the first one of an encoder and over the last
        one of an encoder-decoder.
      dropout: rate before the classifier.
      kernel_init: of the classifier, and of the pooler's dense layer.

    Raises:
      ValueError: for another task.
    """
    if task not in TASKS.values():
        raise ValueError(f"a task is one of {', '.join(TASKS.values())}, not {task!r}")
    options: dict[str, Any] = dict(dropout=dropout, kernel_init=kernel_init)
    if task in ("token", "span"):
        pooler = None
    else:
        # The Hugging Face classes of decoders have no bias here, and all others do.
        options["bias"] = not _is_decoder(model)
        pooler = pooler or _pooler(model, kernel_init)
    if task in ("sequence", "token"):
        classifier = Labels((num_labels,), **options)
    else:
        classifier = {"span": Span, "choice": Score}[task](**options)
    body = {"decoder": None} if task == "token" and isinstance(model, EncoderDecoder) else {}
    return model.clone(head=None, pooler=pooler, classifier=classifier, **body)


def _is_decoder(model: Any) -> bool:
    return isinstance(model, Decoder) and model.causal


def _pooler(model: Any, kernel_init: Init) -> nn.Module:
    if _is_decoder(model):
        return LastToken()
    last = isinstance(model, EncoderDecoder)
    return Dense(LastToken() if last else FirstToken(), kernel_init=kernel_init)


def part_of(path: str) -> str:
    """Returns which part of a model a leaf belongs to: 'stack', 'classifier'."""
    return path.partition("/")[0]


def task_of(model: Any) -> str | None:
    """Returns the task that a model's head is for, or None."""
    kind = type(getattr(model, "classifier", None))
    if kind is Labels:
        return "sequence" if model.pooler is not None else "token"
    return {Span: "span", Score: "choice"}.get(kind)


def read_task(config: Any, model: Any, task: str) -> Any:
    """Returns a model with the head that a `ForeignConfig` describes."""
    labels = config.take("id2label", None) or range(config.take("num_labels", 2))
    return for_task(model, task, len(labels), dropout=config.take("classifier_dropout", 0.0) or 0.0)


def write_task(model: Any) -> dict[str, Any]:
    """Returns the keys of a config that describe the head of a task, but the name of the class."""
    task = task_of(model)
    if task is None:
        return {}
    values: dict[str, Any] = {"classifier_dropout": model.classifier.dropout}
    if task in ("sequence", "token"):
        names = [f"LABEL_{number}" for number in range(model.classifier.features[0])]
        values["id2label"] = {str(number): name for number, name in enumerate(names)}
        values["label2id"] = {name: number for number, name in enumerate(names)}
    return values


def classifier_rows(model: Any, names: Mapping[str, str]) -> list[Weight]:
    """Returns the rows of the classifier; `names` maps a task to their module's name."""
    task = task_of(model)
    return [] if task is None else projection("classifier", names[task], bias=model.classifier.bias)
