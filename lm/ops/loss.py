"""Cross entropy, in fp32 whatever the logits, and the reductions it is reported under."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from lm.core.mesh import BATCH_AXES, PLACES_AXIS, automatic_axes, target_platform

Array = jax.Array

# Logits are held for so many places at a time that a device's take this many bytes, as fp32: on a
# CPU, and on an accelerator, where adding up the gradient of a head of 50,000 tokens takes as long
# as the products of 300 places, and such a chunk has 2,600.
CHUNK_BYTES_CPU, CHUNK_BYTES = 1 << 27, 1 << 29


def default_chunk_bytes(platform: str | None = None) -> int:
    """Returns how many bytes of fp32 logits a device holds; None is what is traced for."""
    return CHUNK_BYTES_CPU if (platform or target_platform()) == "cpu" else CHUNK_BYTES


@struct.dataclass
class CrossEntropy:
    """Sums over a batch; ratios of sums stay exact over micro-batches and devices.

    The loss alone is differentiable: the others are for reports.

    Attributes:
      loss: () fp32, what is minimised: `nll` and, where asked for, its regularisers.
      nll: () fp32, sum of weight * -ln p(target), nats.
      correct: () fp32, sum of weight where the likeliest token is the target.
      weight: () fp32, sum of weights.
    """

    loss: Array
    nll: Array
    correct: Array
    weight: Array


def token_nll(logits_BTV: Array, targets_BT: Array) -> Array:
    """Returns the (B, T) fp32 negative log-likelihoods -ln softmax(logits)[target], nats."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - _picked(logits_BTV, targets_BT)


def _picked(logits_BTV: Array, targets_BT: Array) -> Array:
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def _is_likeliest(logits_BTV: Array, targets_BT: Array) -> Array:
    """Returns `argmax(logits) == targets`: nothing is larger, and nothing before it is equal.

    XLA's CPU backend looks for an argmax one number after the other, 12 times as slowly.
    """
    own_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    before_BTV = jnp.arange(logits_BTV.shape[-1]) < targets_BT[..., None]
    beaten_BTV = (logits_BTV > own_BT1) | ((logits_BTV == own_BT1) & before_BTV)
    return ~beaten_BTV.any(axis=-1)


def cross_entropy(
    logits_BTV: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Returns the weighted sums of negative log-likelihood and of correct predictions.

    nll = sum_bt w_bt * (Z_bt - logits_bt[target_bt]),  Z = ln sum_v exp(logits_v)
    loss = nll, each place with (1 - s) of its own and s of the mean over all tokens, + z Z^2

    Args:
      logits_BTV: (B, T, V), any float dtype.
      targets_BT: (B, T) ids in [0, V).
      weights_BT: (B, T) fp32, constants; a place of weight 0 contributes nothing, to the gradient
        either, whatever its logits.
      label_smoothing: s, spread evenly over the vocabulary (Szegedy et al., 2016).
      z_loss: z, which keeps logits small (Chowdhery et al., 2023: 1e-4).
    """
    weights_BT = jax.lax.stop_gradient(weights_BT)
    kept_BTV = jnp.where((weights_BT != 0)[..., None], logits_BTV, 0).astype(jnp.float32)
    z_BT = jax.nn.logsumexp(kept_BTV, axis=-1)
    nll_BT = z_BT - _picked(kept_BTV, targets_BT)
    loss_BT = nll_BT
    if label_smoothing:
        loss_BT += label_smoothing * (z_BT - kept_BTV.mean(axis=-1) - nll_BT)
    if z_loss:
        loss_BT += z_loss * z_BT**2
    correct_BT = _is_likeliest(logits_BTV, targets_BT)
    return CrossEntropy(
        loss=(weights_BT * loss_BT).sum(),
        nll=jax.lax.stop_gradient((weights_BT * nll_BT).sum()),
        correct=(weights_BT * correct_BT).sum(),
        weight=weights_BT.sum(),
    )


def head_cross_entropy(
    unembed: Callable[[Array], Array],
    x_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    vocab_size: int,
    *,
    chunk_bytes: int | None = None,
    **options: float,
) -> CrossEntropy:
    """Returns `cross_entropy(unembed(x), ...)` without ever holding the logits of all places.

    Logits are made for some places of every row at a time, and so are their gradients, in the
    forward pass: the gradient of a sum needs nothing that comes later. Nothing is computed twice,
    and no gradient for what does not train.

    Args:
      unembed: (B, C, D) -> (B, C, V) logits, each place by itself; it may close over parameters.
      x_BTD: hidden states.
      targets_BT, weights_BT, options: as of `cross_entropy`.
      vocab_size: V.
      chunk_bytes: of the fp32 logits that a device may hold; None is `default_chunk_bytes`. Every
        chunk gathers a head that is divided over devices, and adds up its gradient, so that they
        are not to be many.
    """
    B, T, _ = x_BTD.shape
    chunk_bytes = chunk_bytes or default_chunk_bytes()
    at_once = max(1, chunk_bytes * _num_devices() // (4 * B * vocab_size))
    if at_once >= T:
        return cross_entropy(unembed(x_BTD), targets_BT, weights_BT, **options)
    # Of the places of each device some are in every chunk, so that none has to be moved.
    devices = automatic_axes().get(PLACES_AXIS, 1)
    if T % devices:
        devices = 1
    own = T // devices
    num_chunks = min(-(-T // at_once), own)
    room = -own % num_chunks

    def chunks(a: Array) -> Array:
        a = a.reshape(B, devices, own, *a.shape[2:])
        a = jnp.pad(a, ((0, 0), (0, 0), (0, room)) + ((0, 0),) * (a.ndim - 3))
        a = jnp.moveaxis(a.reshape(B, devices, num_chunks, -1, *a.shape[3:]), 2, 0)
        return a.reshape(num_chunks, B, -1, *a.shape[4:])

    x, targets, weights = map(chunks, (x_BTD, targets_BT, jax.lax.stop_gradient(weights_BT)))
    # What `unembed` closes over becomes arguments, so that it gets a gradient.
    unembed, closed_over = jax.closure_convert(unembed, x[0])
    return _sum_chunks(partial(_chunk, unembed, options), x, targets, weights, *closed_over)


def _num_devices() -> int:
    """Returns over how many devices the compiler divides what is traced, the logits too."""
    return math.prod(automatic_axes().values())


def _keep_rows(x_BCD: Array) -> Array:
    """Returns an activation with its rows divided as the batch's.

    A compiler that is left to choose may divide D instead, as it finds the head divided, and then
    gathers the logits' gradients of all rows in every chunk.
    """
    axes = automatic_axes()
    rows = tuple(axis for axis in BATCH_AXES if axes.get(axis, 1) > 1)
    if not rows or len(x_BCD) % math.prod(axes[axis] for axis in rows):
        return x_BCD
    open_dim = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x_BCD, PartitionSpec(rows, open_dim, open_dim))


def _chunk(unembed, options, x_BCD, targets_BC, weights_BC, *closed_over) -> CrossEntropy:
    return cross_entropy(unembed(x_BCD, *closed_over), targets_BC, weights_BC, **options)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(chunk, x, targets, weights, *closed_over) -> CrossEntropy:
    """Returns the sums of `chunk` over the first axis of `x`, `targets` and `weights`."""

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, chunk(*inputs, *closed_over)), None

    return jax.lax.scan(add, _zeros(), (x, targets, weights))[0]


def _zeros() -> CrossEntropy:
    return CrossEntropy(*[jnp.zeros((), jnp.float32)] * 4)


def _forward(chunk, x, targets, weights, *closed_over):
    """Returns the sums, and the gradient of the loss for `x` and for what is differentiated."""
    constants = [leaf.value for leaf in closed_over]
    trained = [index for index, leaf in enumerate(closed_over) if leaf.perturbed]

    def add(carry, inputs):
        sums, grads = carry
        x_BCD, *rest = inputs

        def loss(x_BCD, leaves):
            leaves = dict(zip(trained, leaves))
            own = [leaves.get(index, leaf) for index, leaf in enumerate(constants)]
            new = chunk(x_BCD, *rest, *own)
            return new.loss, new

        x_BCD = _keep_rows(x_BCD)
        leaves = [constants[index] for index in trained]
        (grad_BCD, more), new = jax.grad(loss, (0, 1), has_aux=True)(x_BCD, leaves)
        carry = jax.tree.map(jnp.add, (sums, grads), (new, more))
        return carry, _keep_rows(grad_BCD)

    zeros = [jnp.zeros_like(constants[index]) for index in trained]
    inputs = x.value, targets.value, weights.value
    (sums, grads), grad_x = jax.lax.scan(add, (_zeros(), zeros), inputs)
    every: list[Array | None] = [None] * len(constants)
    for index, grad in zip(trained, grads):
        every[index] = grad
    return sums, (grad_x, every)


def _backward(chunk, saved, cotangents):
    scale = cotangents.loss
    grad_x, grads = saved

    def scaled(grad):
        return None if grad is None else grad * scale.astype(grad.dtype)

    return scaled(grad_x), None, None, *map(scaled, grads)


_sum_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


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
