"""What is minimised: frozen dataclasses that map a batch to sums, so that means stay exact.

    objective(model, params, batch, ctx, key) -> (loss_sum, weight_sum, metrics)

The loss is loss_sum / weight_sum after both are added up over micro-batches and devices; metrics
are name -> (sum, count), to be divided likewise. All losses are nats.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.context import Context
from lm.ops.loss import CrossEntropy, cross_entropy, head_cross_entropy, token_nll

Array = jax.Array
Params = Any
Metrics = dict[str, tuple[Array, Array]]
Losses = tuple[Array, Array, Metrics]


class Objective(Protocol):
    """What a train step minimises."""

    def __call__(
        self, model: nn.Module, params: Params, batch: Batch, ctx: Context, key: Array
    ) -> Losses: ...


def context_of(batch: Batch, ctx: Context) -> Context:
    """Returns `ctx` with the positions, segments and source of a batch."""
    return ctx.replace(
        positions_BT=batch.positions,
        segments_BT=batch.segments,
        token_types_BT=batch.token_types,
        source_BS=batch.source,
        source_segments_BS=batch.source_segments,
    )


def vocabulary_losses(
    model, params, x_BTD: Array, targets_BT: Array, weights_BT: Array, ctx: Context, **options
) -> CrossEntropy:
    """Returns the sums over hidden states; (B, T, V) logits are not held where they are large."""

    def unembed(x_BCD: Array) -> Array:
        return model.apply({"params": params}, x_BCD, ctx, method="unembed")

    args = x_BTD, targets_BT, weights_BT
    return head_cross_entropy(unembed, *args, model.vocab_size, **options)


@dataclass(frozen=True)
class Generative:
    """-ln p(x) = -sum_t ln p(x_t | x_<t), over the places that `batch.weights` counts.

    Attributes:
      label_smoothing, z_loss: as of `lm.ops.loss.cross_entropy`; the metric 'nll' is without them.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        ctx = context_of(batch, ctx)
        x_BTD, _ = model.apply(
            {"params": params}, batch.tokens, ctx, rngs={"dropout": key}, method="hidden"
        )
        options = dict(label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        args = model, params, x_BTD, batch.targets, batch.weights, ctx
        sums = vocabulary_losses(*args, **options)
        metrics = {"accuracy": (sums.correct, sums.weight)}
        if any(options.values()):
            metrics["nll"] = (sums.nll, sums.weight)
        return sums.loss, sums.weight, metrics


@dataclass(frozen=True)
class Masked:
    """-sum_{m in M} ln p(x_m | x_{-M}): BERT's masked loss (Devlin et al., 2019).

    The set M is drawn anew for each batch and removed as a whole: no chosen token helps to predict
    another. It reads `batch.tokens` with the bidirectional mask; `batch.targets` and
    `batch.weights`, which are about next tokens, play no part.

    Attributes:
      mask_id: token that stands for a removed one.
      special_ids: tokens never chosen, such as the start token; padding never is.
      rate: probability that a token is chosen.
      masked, random: of the chosen, the fraction shown as `mask_id` and the fraction shown as a
        token drawn from the whole vocabulary; the others are shown as they are.
    """

    mask_id: int
    special_ids: tuple[int, ...] = ()
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def corrupt(
        self, tokens_BT: Array, segments_BT: Array, vocab_size: int, key: Array
    ) -> tuple[Array, Array]:
        """Returns the (B, T) tokens as the model sees them, and the (B, T) booleans of M.

        A row has at most `places` of them; what was drawn beyond that is not chosen.
        """
        choose, show, draw = jax.random.split(key, 3)
        maskable_BT = segments_BT != 0
        for special in self.special_ids:
            maskable_BT &= tokens_BT != special
        chosen_BT = maskable_BT & (jax.random.uniform(choose, tokens_BT.shape) < self.rate)
        chosen_BT &= jnp.cumsum(chosen_BT, axis=1) <= self.places(tokens_BT.shape[1])
        how_BT = jax.random.uniform(show, tokens_BT.shape)
        random_BT = jax.random.randint(draw, tokens_BT.shape, 0, vocab_size, tokens_BT.dtype)
        shown_BT = jnp.where(how_BT < self.masked + self.random, random_BT, tokens_BT)
        shown_BT = jnp.where(how_BT < self.masked, self.mask_id, shown_BT)
        return jnp.where(chosen_BT, shown_BT, tokens_BT), chosen_BT

    def places(self, length: int) -> int:
        """Returns for how many places of a row the head is computed.

        It is the expected number of chosen ones and five standard deviations more, so that one row
        in millions has a chosen place less than was drawn.
        """
        spread = math.sqrt(length * self.rate * (1 - self.rate))
        return min(length, math.ceil(length * self.rate + 5 * spread))

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        """Computes the head over the vocabulary at the chosen places alone.

        Raises:
          ValueError: if `mask_id` is not a token of the model.
        """
        if not 0 <= self.mask_id < model.vocab_size:
            raise ValueError(
                f"mask_id {self.mask_id} is not among the {model.vocab_size} tokens of the model: "
                "give the vocabulary a mask token"
            )
        corrupt_key, dropout_key = jax.random.split(key)
        ctx = context_of(batch, ctx).replace(causal=False)
        shown_BT, chosen_BT = self.corrupt(
            batch.tokens, batch.segments, model.vocab_size, corrupt_key
        )
        # The chosen places come first, in order; a fixed number of places fits the compiler.
        places_BM = jnp.argsort(~chosen_BT, axis=1)[:, : self.places(chosen_BT.shape[1])]
        x_BTD, _ = model.apply(
            {"params": params}, shown_BT, ctx, rngs={"dropout": dropout_key}, method="hidden"
        )
        x_BMD = jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1)
        targets_BM, chosen_BM = (
            jnp.take_along_axis(x_BT, places_BM, axis=1) for x_BT in (batch.tokens, chosen_BT)
        )
        args = x_BMD, targets_BM, chosen_BM.astype(jnp.float32), ctx
        sums = vocabulary_losses(model, params, *args)
        return sums.loss, sums.weight, {"masked_accuracy": (sums.correct, sums.weight)}


@dataclass(frozen=True)
class AlphaMix:
    """-ln p(x) + alpha * -sum_{m in M} ln p(x_m | x_{-M}), with one set of parameters.

    The same model runs twice, with the causal and with the bidirectional mask. Both terms are
    sums over the same text and are divided by the same number, that of its predicted tokens.

    Attributes:
      alpha: weight of the masked loss.
      masked: the masked loss.
    """

    alpha: float
    masked: Masked

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        causal, bidirectional = jax.random.split(key)
        gen_sum, weight, gen_metrics = Generative()(
            model, params, batch, ctx.replace(causal=True), causal
        )
        masked_sum, masked_weight, masked_metrics = self.masked(
            model, params, batch, ctx, bidirectional
        )
        parts = {
            "generative_loss": (gen_sum, weight),
            "masked_loss": (masked_sum, masked_weight),
        }
        return gen_sum + self.alpha * masked_sum, weight, parts | gen_metrics | masked_metrics


@dataclass(frozen=True)
class Conditional:
    """-ln p(y | x): ordinary finetuning of a classifier on `batch.labels`.

    The model has `classify` with a pooler (`lm.models.tasks.for_task` with 'sequence').
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        return label_losses(classify(model, params, batch, ctx, key), batch)


@dataclass(frozen=True)
class Tags:
    """-sum_t w_t ln p(y_t | x): a label for every place.

    The labels are `batch.targets` and count by `batch.weights`; 0 ignores a place.
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        logits_BTC = classify(model, params, batch, ctx, key)
        sums = cross_entropy(logits_BTC, batch.targets, batch.weights)
        return sums.loss, sums.weight, {"label_accuracy": (sums.correct, sums.weight)}


@dataclass(frozen=True)
class Span:
    """-ln p(begin | x) - ln p(end | x): which places an answer begins and ends at, inclusively.

    `batch.labels` is (B, 2); the softmax is over the places that are not padding. Each end is one
    prediction of the mean, and does not count where its label is no such place.
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        real_BT1 = batch.segments[..., None] != 0
        logits_BT2 = classify(model, params, batch, ctx, key).astype(jnp.float32)
        logits_B2T = jnp.where(real_BT1, logits_BT2, -1e30).swapaxes(1, 2)
        labels_B2 = labels_of(batch)
        length = batch.segments.shape[1]
        place_B2 = jnp.clip(labels_B2, 0, length - 1)
        inside_B2 = (labels_B2 == place_B2) & (
            jnp.take_along_axis(batch.segments, place_B2, axis=1) != 0
        )
        sums = cross_entropy(logits_B2T, place_B2, inside_B2.astype(jnp.float32))
        exact_B = (logits_B2T.argmax(axis=-1) == labels_B2).all(axis=1)
        count_B = inside_B2.all(axis=1)
        metrics = {
            "label_accuracy": (sums.correct, sums.weight),
            "exact_match": ((exact_B & count_B).sum(), count_B.sum()),
        }
        return sums.loss, sums.weight, metrics


@dataclass(frozen=True)
class Choice:
    """-ln p(choice): the right one of C sequences, by the softmax over their scores.

    `batch.labels` is (B,); `tokens`, `segments`, `positions` and `token_types` are (B, C, T).
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        if batch.tokens.ndim != 3:
            raise ValueError(
                f"choices are tokens of shape (rows, choices, places), not {batch.tokens.shape}"
            )
        names = ("tokens", "segments", "positions", "token_types")
        fields = {name: getattr(batch, name) for name in names}
        flat = {
            name: field.reshape(-1, field.shape[-1])
            for name, field in fields.items()
            if field is not None
        }
        scores = classify(model, params, batch.replace(**flat), ctx, key)
        return label_losses(scores.reshape(batch.tokens.shape[:2]), batch)


def classify(model, params, batch: Batch, ctx: Context, key: Array) -> Array:
    """Returns the logits of a model's classifier, with the positions and segments of a batch."""
    ctx = context_of(batch, ctx)
    rngs = {"dropout": key}
    return model.apply({"params": params}, batch.tokens, ctx, rngs=rngs, method="classify")


@dataclass(frozen=True)
class Joint:
    """-ln p(x, y) = -ln p(x) - ln p(y | x), for a decoder with a classifier beside its head.

    The label is one more prediction after the text's; the mean is over all of them.
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        ctx = context_of(batch, ctx)
        x_BTD, logits_BC = model.apply(
            {"params": params}, batch.tokens, ctx, rngs={"dropout": key}, method=_text_and_label
        )
        text = vocabulary_losses(model, params, x_BTD, batch.targets, batch.weights, ctx)
        label_sum, label_count, label_metrics = label_losses(logits_BC, batch)
        metrics = {
            "text_loss": (text.loss, text.weight),
            "label_loss": (label_sum, label_count),
            "accuracy": (text.correct, text.weight),
        }
        return text.loss + label_sum, text.weight + label_count, metrics | label_metrics


def _text_and_label(model, tokens_BT: Array, ctx: Context) -> tuple[Array, Array]:
    x_BTD, _ = model.hidden(tokens_BT, ctx)
    return x_BTD, model.label_logits(x_BTD, ctx)


def labels_of(batch: Batch) -> Array:
    """Returns the labels of a batch; ValueError where there are none."""
    if batch.labels is None:
        raise ValueError("this objective needs labels, and the batches have none")
    return batch.labels


def label_losses(logits_BC: Array, batch: Batch) -> Losses:
    """Returns the sums of -ln p(label), over the rows that are not padding."""
    labels_B = labels_of(batch)
    real_B = (batch.segments != 0).reshape(len(labels_B), -1).any(axis=1).astype(jnp.float32)
    nll_B = token_nll(logits_BC[:, None], labels_B[:, None])[:, 0]
    correct_B = logits_BC.argmax(axis=-1) == labels_B
    count = real_B.sum()
    return (real_B * nll_B).sum(), count, {"label_accuracy": ((real_B * correct_B).sum(), count)}
