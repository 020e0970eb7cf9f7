"""How well a model predicts a split: loss, perplexity, bits, and top-1 reconstruction."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.batch import Batch
from lm.core.context import Context, positions_of
from lm.infer.score import predict

Array = jax.Array


def evaluate(
    model: Any,
    params: Any,
    batches: Iterable[Batch],
    objective: Callable | None = None,
    *,
    tokenizer: Any = None,
    max_batches: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, float]:
    """Returns the metrics of a model on the batches of a split.

    Without an objective the model predicts each next token, and with m the places of weight
    above 0 and h the hits (the likeliest token is the target),
      loss = sum(weight * -ln p(target)) / sum(weight)    in nats per token
      top1_rec_masked = mean over rows of sum_m(h) / |m|
      top1_rec_unmasked = mean over rows of sum(h) / T, padding included, which inflates it
    The original `top1_rec` is the sum over rows of the latter. To be read as it read it, padding
    counts as text that goes on after the last document; being behind all that is real, it changes
    nothing there. With an objective the loss and the metrics are that objective's.

    Sums are kept on the device, without losing what rounds off, and are read once, at the end.

    Args:
      model, params: the model.
      batches: of one shape each; rows without any weight do not count.
      objective: `(model, params, batch, ctx, key) -> (loss_sum, weight_sum, metrics)`, or None.
      tokenizer: counts characters and bytes of the targets' text; None leaves out the bits, which
        only a loss on the whole text has (of a masked objective they would say nothing).
      max_batches: stops after that many; None takes all.
      seed: the objective's randomness.
      dtype: the compute dtype.

    Returns:
      'loss' and 'perplexity' = exp(loss); the objective's metrics, or 'accuracy' (hits per
      token) and the two 'top1_rec_'; 'bits_per_character' and 'bits_per_byte', if there is a
      tokenizer: all nats, those of the end-of-text token included, over the characters and UTF-8
      bytes of the text alone; and the counts 'tokens', 'sequences', 'characters' and 'bytes'.

    Raises:
      ValueError: if there is nothing to predict, or the model is bidirectional and there is no
        objective.
    """
    if objective is None and not model.causal:
        raise ValueError(
            "a bidirectional model predicts no next token: evaluate it by an objective"
        )
    key = jax.random.key(seed)
    total, characters, num_bytes = None, 0, 0
    for index, batch in enumerate(islice(batches, max_batches)):
        args = (params, batch, jax.random.fold_in(key, index))
        static = dict(model=model, objective=objective, dtype=dtype)
        if total is None:
            shapes = jax.eval_shape(partial(_sums, **static), *args)
            total = tuple(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes) for _ in "sl")
        total = _accumulate(total, *args, **static)
        if tokenizer is not None:
            sizes = text_size(batch, tokenizer)
            characters, num_bytes = characters + sizes[0], num_bytes + sizes[1]
    if total is None:
        raise ValueError("there is nothing to evaluate: the split has no batches")
    sums = jax.tree.map(lambda sum, lost: sum.astype(np.float64) + lost, *jax.device_get(total))
    nats, weight = sums.pop("nats"), sums.pop("weight")
    if not weight > 0:
        raise ValueError("there is nothing to evaluate: no place of the split has any weight")
    with np.errstate(over="ignore"):  # Infinity says it well enough.
        metrics = {"loss": nats / weight, "perplexity": np.exp(nats / weight)}
    if objective is None:
        metrics |= _rates(sums)
    else:
        metrics |= {name: value / count for name, (value, count) in sums["metrics"].items()}
    if tokenizer is not None and characters:
        metrics["bits_per_character"] = nats / math.log(2) / characters
        metrics["bits_per_byte"] = nats / math.log(2) / num_bytes
        metrics |= {"characters": characters, "bytes": num_bytes}
    return {name: float(value) for name, value in metrics.items()}


def text_size(batch: Batch, tokenizer: Any) -> tuple[int, int]:
    """Returns the numbers of characters and of UTF-8 bytes in the text of a batch's targets."""
    characters = num_bytes = 0
    targets, weights, segments = map(np.asarray, (batch.targets, batch.weights, batch.segments))
    for row in range(len(targets)):
        real = weights[row] > 0
        for segment in np.unique(segments[row][real]):
            ids = targets[row][real & (segments[row] == segment)]
            text = tokenizer.decode([i for i in ids.tolist() if i != tokenizer.eos_id])
            characters, num_bytes = characters + len(text), num_bytes + len(text.encode())
    return characters, num_bytes


def _sums(params, batch: Batch, key: Array, *, model, objective, dtype: str) -> dict[str, Any]:
    """Returns everything that adds up over batches."""
    if objective is None:
        return _prediction_sums(model, params, batch, dtype)
    nats, weight, metrics = objective(model, params, batch, Context(dtype=dtype), key)
    return jax.tree.map(jnp.asarray, {"nats": nats, "weight": weight, "metrics": metrics})


def _prediction_sums(model, params, batch: Batch, dtype: str) -> dict[str, Array]:
    segments_BT = jax.lax.cummax(jnp.asarray(batch.segments), axis=1)
    positions_BT = positions_of(segments_BT)
    if batch.positions is not None:
        positions_BT = jnp.where(batch.segments == 0, positions_BT, batch.positions)
    ctx = Context(
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        token_types_BT=batch.token_types,
        source_BS=batch.source,
        source_segments_BS=batch.source_segments,
        dtype=dtype,
    )
    nll_BT, hits_BT = predict(model, params, batch.tokens, batch.targets, ctx)
    real_BT = batch.weights > 0
    T = hits_BT.shape[1]
    num_real_B = real_BT.sum(axis=1)
    hits_B = (hits_BT & real_BT).sum(axis=1)
    # Integers by length of the row, so that the mean of the rows' fractions is exact in the end.
    by_length = partial(jax.ops.segment_sum, segment_ids=num_real_B, num_segments=T + 1)
    return {
        "nats": jnp.where(real_BT, batch.weights * nll_BT, 0.0).sum(),
        "weight": batch.weights.sum(),
        "hits_by_length": by_length(hits_B),
        "rows_by_length": by_length(jnp.ones_like(num_real_B)),
        "hits_unmasked": jnp.where(num_real_B > 0, hits_BT.sum(axis=1), 0).sum(),
    }


@partial(jax.jit, static_argnames=("model", "objective", "dtype"), donate_argnames="total")
def _accumulate(total, params, batch: Batch, key: Array, *, model, objective, dtype: str):
    """Adds to a tree of sums and to one of what their rounding lost: Knuth's two-sum."""

    def rounded_off(old, new, out):
        grown = out - old
        return (old - (out - grown)) + (new - grown)

    old, lost = total
    new = _sums(params, batch, key, model=model, objective=objective, dtype=dtype)
    out = jax.tree.map(jnp.add, old, new)
    return out, jax.tree.map(jnp.add, lost, jax.tree.map(rounded_off, old, new, out))


def _rates(sums: dict[str, np.ndarray]) -> dict[str, float]:
    lengths = np.arange(1, len(sums["rows_by_length"]))
    hits, rows = sums["hits_by_length"][1:], sums["rows_by_length"][1:]
    num_rows, num_places = rows.sum(), (rows * lengths).sum()
    return {
        "accuracy": hits.sum() / num_places,
        "top1_rec_masked": math.fsum(hits / lengths) / num_rows,
        "top1_rec_unmasked": sums["hits_unmasked"] / len(lengths) / num_rows,
        "tokens": num_places,
        "sequences": num_rows,
    }
