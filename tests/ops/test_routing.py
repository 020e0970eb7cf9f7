"""Which experts tokens go to, and the losses of routers, against loops over tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.routing import expert_choice, load_balancing_loss, route, z_loss

T, E = 12, 4
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32) * 2
MASK = np.arange(T) % 5 != 3


def probabilities(logits):
    """Of one token, in fp64."""
    exponentials = [math.exp(value) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def by_size(values):
    """Returns the indices of some values, largest first, and of equal ones the first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_route(k, normalise):
    experts_TK, weights_TK = route(jnp.asarray(LOGITS, jnp.bfloat16), k, normalise)
    assert weights_TK.dtype == jnp.float32
    for t, logits in enumerate(LOGITS.astype(jnp.bfloat16).astype(np.float64)):
        probs = probabilities(logits)
        chosen = by_size(probs)[:k]
        total = sum(probs[e] for e in chosen) if normalise else 1
        assert list(experts_TK[t]) == chosen
        np.testing.assert_allclose(weights_TK[t], [probs[e] / total for e in chosen], rtol=1e-6)


@pytest.mark.parametrize("capacity", [1, 3, T])
def test_experts_choose(capacity):
    """The likeliest tokens of each expert; padding last, and with weight 0."""
    tokens_EC, weights_EC = expert_choice(jnp.asarray(LOGITS), capacity, jnp.asarray(MASK))
    probs = [probabilities(logits) if real else [0] * E for logits, real in zip(LOGITS, MASK)]
    for e in range(E):
        chosen = by_size([probs[t][e] for t in range(T)])[:capacity]
        assert list(tokens_EC[e]) == chosen
        np.testing.assert_allclose(weights_EC[e], [probs[t][e] for t in chosen], rtol=1e-6)


def losses_by_loop(logits_TE, k, mask_T, experts):
    """Returns the load-balancing and the z-loss, token by token, in fp64."""
    fractions, means, squares, count = [0.0] * E, [0.0] * E, 0.0, sum(mask_T)
    for logits, real, chosen in zip(np.float64(logits_TE), mask_T, experts):
        if real:
            for e, value in enumerate(probabilities(logits)):
                means[e] += value / count
                fractions[e] += (e in chosen) / (k * count)
            squares += math.log(sum(math.exp(value) for value in logits)) ** 2 / count
    return E * sum(f * p for f, p in zip(fractions, means)), squares


@pytest.mark.parametrize("mask_T", [None, MASK], ids=["all", "padded"])
@pytest.mark.parametrize("k", [1, 2])
def test_losses(k, mask_T):
    """Values against a loop, and gradients against its central differences."""
    real_T = np.ones(T, bool) if mask_T is None else mask_T
    experts_TK = route(jnp.asarray(LOGITS), k).experts_TK
    chosen = np.asarray(experts_TK).tolist()

    def ours(logits_TE):
        return jnp.stack(
            [load_balancing_loss(logits_TE, experts_TK, mask_T), z_loss(logits_TE, mask_T)]
        )

    expected = losses_by_loop(LOGITS, k, real_T, chosen)
    np.testing.assert_allclose(ours(jnp.asarray(LOGITS)), expected, rtol=1e-5)
    grads = jax.jacobian(ours)(jnp.asarray(LOGITS))
    for t in range(T):
        for e in range(E):
            moved = np.zeros((T, E))
            moved[t, e] = 1e-5
            above = losses_by_loop(LOGITS + moved, k, real_T, chosen)
            below = losses_by_loop(LOGITS - moved, k, real_T, chosen)
            slope = (np.array(above) - np.array(below)) / 2e-5
            np.testing.assert_allclose(grads[:, t, e], slope, atol=1e-5)


def test_losses_of_routers_that_are_known():
    """An even router has a balancing loss of 1, and one that has a single favourite E."""
    even = jnp.zeros((T, E))
    np.testing.assert_allclose(load_balancing_loss(even, route(even, 2).experts_TK), 1, rtol=1e-6)
    np.testing.assert_allclose(z_loss(even), math.log(E) ** 2, rtol=1e-6)
    favourite = jnp.zeros((T, E)).at[:, 2].set(50.0)
    chosen = route(favourite, 1).experts_TK
    np.testing.assert_allclose(load_balancing_loss(favourite, chosen), E, rtol=1e-6)
    nothing = jnp.zeros(T, bool)
    assert load_balancing_loss(favourite, chosen, nothing) == z_loss(favourite, nothing) == 0


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_load_balancing_loss_is_mixtrals(k):
    """Mixtral's counts the choices of a token, and not their fraction: it is k times ours."""
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    theirs = mixtral.load_balancing_loss_func(
        (torch.tensor(LOGITS),), E, k, torch.tensor(MASK[None].astype(np.int64))
    )
    experts_TK = route(jnp.asarray(LOGITS), k).experts_TK
    ours = load_balancing_loss(jnp.asarray(LOGITS), experts_TK, jnp.asarray(MASK))
    np.testing.assert_allclose(k * ours, float(theirs), rtol=1e-5)


@pytest.mark.parametrize("k", [0, E + 1])
def test_more_experts_than_there_are(k):
    with pytest.raises(ValueError, match=rf"goes to 1\.\.4 of 4 experts, not to {k}"):
        route(jnp.asarray(LOGITS), k)
