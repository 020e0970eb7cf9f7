"""Cross entropy, in fp32 whatever the logits, and the reductions it is reported under."""

import math

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class CrossEntropy:
    """Sums over a batch; ratios of sums stay exact over micro-batches and devices.

    Attributes:
      nll: () fp32, sum of weight * -ln p(target), nats.
      correct: () fp32, sum of weight where the likeliest token is the target.
      weight: () fp32, sum of weights.
    """

    nll: Array
    correct: Array
    weight: Array


def token_nll(logits_BTV: Array, targets_BT: Array) -> Array:
    """Returns the (B, T) fp32 negative log-likelihoods -ln softmax(logits)[target], nats."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def cross_entropy(logits_BTV: Array, targets_BT: Array, weights_BT: Array) -> CrossEntropy:
    """Returns the weighted sums of negative log-likelihood and of correct predictions.

    sum_bt w_bt * -ln softmax(logits_bt)[target_bt]

    Args:
      logits_BTV: (B, T, V), any float dtype.
      targets_BT: (B, T) ids in [0, V).
      weights_BT: (B, T) fp32; a place of weight 0 contributes nothing, to the gradient either,
        whatever its logits.
    """
    keep_BT = weights_BT != 0
    nll_BT = token_nll(jnp.where(keep_BT[..., None], logits_BTV, 0), targets_BT)
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return CrossEntropy(
        nll=(weights_BT * nll_BT).sum(),
        correct=(weights_BT * correct_BT).sum(),
        weight=weights_BT.sum(),
    )


def nll(nll_BT: Array, weights_BT: Array | None = None, reduction: str = "sum") -> Array:
    """Reduces (B, T) token losses to one number, in nats.

    Args:
      nll_BT: what `token_nll` returns.
      weights_BT: 1 where a place counts; None counts padding like any other place.
      reduction: 'sum' is the total over the batch; 'mean' sums over each sequence and averages
        over the batch, so it is nats per *sequence*; 'token' averages over all the tokens that
        count.

    Raises:
      ValueError: for another reduction.
    """
    weights_BT = jnp.ones_like(nll_BT) if weights_BT is None else weights_BT
    total = (weights_BT * nll_BT).sum()
    divisors = {"sum": 1, "mean": nll_BT.shape[0], "token": weights_BT.sum()}
    if reduction not in divisors:
        raise ValueError(f"reduction is 'sum', 'mean' or 'token', not {reduction!r}")
    return total / divisors[reduction]


def nll_report(nll_BT: Array, weights_BT: Array, num_chars: int) -> dict[str, float]:
    """Returns every customary reduction of the token losses of a batch, by its full name.

    Keys ending in '_with_padding' count all places, the others those of weight 1. Padding that
    is easy to predict makes the former look far better than the text is modelled.

    Args:
      nll_BT: what `token_nll` returns.
      weights_BT: 1 where a place counts.
      num_chars: characters of the text that those places predict.
    """
    report = {}
    for suffix, weights in (("", weights_BT), ("_with_padding", None)):
        report |= {
            f"nats_total{suffix}": float(nll(nll_BT, weights, "sum")),
            f"nats_per_sequence{suffix}": float(nll(nll_BT, weights, "mean")),
            f"nats_per_token{suffix}": float(nll(nll_BT, weights, "token")),
        }
    report["bits_per_char"] = report["nats_total"] / math.log(2) / num_chars
    return report
