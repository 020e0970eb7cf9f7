"""Mixtures of experts: which experts each token goes to, and the losses that keep a router even.

Here T counts the tokens of a whole batch, E experts, K the experts of one token, the likeliest
first, and C the places that an expert has. What is computed on the way is (T, E) at the most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Routes(NamedTuple):
    """Where each token goes.

    Attributes:
      experts_TK: int32, its experts.
      weights_TK: fp32, what their outputs are multiplied by before they are added.
    """

    experts_TK: Array
    weights_TK: Array


def route(logits_TE: Array, k: int, normalise: bool = True) -> Routes:
    """Returns the k experts with the largest softmax(logits) of each token (Shazeer et al., 2017).

    Args:
      logits_TE: of the router, any dtype; the softmax is fp32.
      k: experts of a token.
      normalise: whether the weights are divided by their sum (Lepikhin et al., 2021), or are the
        probabilities themselves (Fedus et al., 2021). With k = 1 a weight that is divided by
        itself is 1, and teaches the router nothing.

    Raises:
      ValueError: if there are fewer experts than k.
    """
    num_experts = logits_TE.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"a token goes to 1..{num_experts} of {num_experts} experts, not to {k}")
    probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32))
    weights_TK, experts_TK = jax.lax.top_k(probs_TE, k)
    if normalise:
        weights_TK /= weights_TK.sum(-1, keepdims=True)
    return Routes(experts_TK, weights_TK)


def expert_choice(
    logits_TE: Array, capacity: int, mask_T: Array | None = None
) -> tuple[Array, Array]:
    """Returns the tokens that each expert chooses, the likeliest first (Zhou et al., 2022).

    Every expert has the same work, and none is dropped for want of room; a token may have many
    experts or none. Which tokens are chosen depends on later ones, so that a causal model that
    is trained this way computes something else when it decodes.

    Args:
      logits_TE: of the router.
      capacity: tokens that an expert chooses, C <= T.
      mask_T: False for padding, which has weight 0, or None.

    Returns:
      tokens_EC int32 and weights_EC fp32, the softmax over the experts of each token.
    """
    probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32))
    if mask_T is not None:
        probs_TE = jnp.where(mask_T[:, None], probs_TE, 0)
    weights_EC, tokens_EC = jax.lax.top_k(probs_TE.T, capacity)
    return tokens_EC, weights_EC


def load_balancing_loss(logits_TE: Array, experts_TK: Array, mask_T: Array | None = None) -> Array:
    """Returns E sum_e f_e P_e, which is 1 for an even router (Fedus et al., 2021).

    f_e is the fraction of all choices that went to expert e, and P_e its mean probability. Where
    the choices of a token are counted and not their fraction, as in Mixtral's code, the loss is K
    times as much.

    Args:
      logits_TE: of the router.
      experts_TK: as of `route`, before anything is dropped.
      mask_T: False for padding, which does not count, or None.
    """
    probs_TE = jax.nn.softmax(logits_TE.astype(jnp.float32))
    E, K = probs_TE.shape[1], experts_TK.shape[1]
    share_T = _shares(len(probs_TE), mask_T)
    chosen_E = jnp.zeros(E).at[experts_TK].add(share_T[:, None] / K)
    return E * jnp.vdot(chosen_E, share_T @ probs_TE)


def z_loss(logits_TE: Array, mask_T: Array | None = None) -> Array:
    """Returns the mean of logsumexp(logits)^2, which keeps logits small (Zoph et al., 2022).

    Arguments as of `load_balancing_loss`.
    """
    share_T = _shares(len(logits_TE), mask_T)
    return jnp.vdot(share_T, jax.nn.logsumexp(logits_TE.astype(jnp.float32), axis=-1) ** 2)


def _shares(num_tokens: int, mask_T: Array | None) -> Array:
    """Returns what each token counts in a mean: all alike, and padding nothing."""
    counted_T = jnp.ones(num_tokens) if mask_T is None else mask_T.astype(jnp.float32)
    return counted_T / jnp.maximum(counted_T.sum(), 1)
