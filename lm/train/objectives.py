"""What is minimised: frozen dataclasses that map a batch to sums, so that means stay exact.

    objective(model, params, batch, ctx, key) -> (loss_sum, weight_sum, metrics)

The loss is loss_sum / weight_sum after both are added up over micro-batches and devices; metrics
are name -> (sum, count), to be divided likewise. All losses are nats.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.context import Context
from lm.ops.loss import cross_entropy, token_nll

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


@dataclass(frozen=True)
class Generative:
    """-ln p(x) = -sum_t ln p(x_t | x_<t), over the places that `batch.weights` counts."""

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        ctx = context_of(batch, ctx)
        logits_BTV, _ = model.apply({"params": params}, batch.tokens, ctx, rngs={"dropout": key})
        sums = cross_entropy(logits_BTV, batch.targets, batch.weights)
        return sums.nll, sums.weight, {"accuracy": (sums.correct, sums.weight)}


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
        """Returns the (B, T) tokens as the model sees them, and the (B, T) booleans of M."""
        choose, show, draw = jax.random.split(key, 3)
        maskable_BT = segments_BT != 0
        for special in self.special_ids:
            maskable_BT &= tokens_BT != special
        chosen_BT = maskable_BT & (jax.random.uniform(choose, tokens_BT.shape) < self.rate)
        how_BT = jax.random.uniform(show, tokens_BT.shape)
        random_BT = jax.random.randint(draw, tokens_BT.shape, 0, vocab_size, tokens_BT.dtype)
        shown_BT = jnp.where(how_BT < self.masked + self.random, random_BT, tokens_BT)
        shown_BT = jnp.where(how_BT < self.masked, self.mask_id, shown_BT)
        return jnp.where(chosen_BT, shown_BT, tokens_BT), chosen_BT

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        """Raises ValueError if `mask_id` is not a token of the model."""
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
        logits_BTV, _ = model.apply(
            {"params": params}, shown_BT, ctx, rngs={"dropout": dropout_key}
        )
        sums = cross_entropy(logits_BTV, batch.tokens, chosen_BT.astype(jnp.float32))
        return sums.nll, sums.weight, {"masked_accuracy": (sums.correct, sums.weight)}


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

    The model has `classify` (an `Encoder` with a classifier, a `DecoderClassifier`).
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        logits_BC = model.apply(
            {"params": params},
            batch.tokens,
            context_of(batch, ctx),
            rngs={"dropout": key},
            method="classify",
        )
        return label_losses(logits_BC, batch)


@dataclass(frozen=True)
class Joint:
    """-ln p(x, y) = -ln p(x) - ln p(y | x), for a `DecoderClassifier`.

    The label is one more prediction after the text's; the mean is over all of them.
    """

    def __call__(self, model, params, batch: Batch, ctx: Context, key: Array) -> Losses:
        ctx = context_of(batch, ctx)
        logits_BTV, logits_BC = model.apply(
            {"params": params}, batch.tokens, ctx, rngs={"dropout": key}, method=_text_and_label
        )
        text = cross_entropy(logits_BTV, batch.targets, batch.weights)
        label_sum, label_count, label_metrics = label_losses(logits_BC, batch)
        metrics = {
            "text_loss": (text.nll, text.weight),
            "label_loss": (label_sum, label_count),
            "accuracy": (text.correct, text.weight),
        }
        return text.nll + label_sum, text.weight + label_count, metrics | label_metrics


def _text_and_label(model, tokens_BT: Array, ctx: Context) -> tuple[Array, Array]:
    x_BTD, _ = model.hidden(tokens_BT, ctx)
    return model.unembed(x_BTD, ctx), model.label_logits(x_BTD, ctx)


def label_losses(logits_BC: Array, batch: Batch) -> Losses:
    """Returns the sums of -ln p(label), over the rows that are not padding."""
    if batch.labels is None:
        raise ValueError("this objective needs labels, and the batches have none")
    real_B = (batch.segments != 0).any(axis=1).astype(jnp.float32)
    nll_B = token_nll(logits_BC[:, None], batch.labels[:, None])[:, 0]
    correct_B = logits_BC.argmax(axis=-1) == batch.labels
    count = real_B.sum()
    return (real_B * nll_B).sum(), count, {"label_accuracy": ((real_B * correct_B).sum(), count)}
