"""From logits to the next token: what filters them, and the draw itself.

Every setting is a number or one number per row, and is traced: another temperature is the same
compiled program. What is off in all rows costs nothing: a filter's sort, the penalty, and where all
rows are greedy the whole draw, its noise included.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Sampling:
    """How the next token is drawn; each field is a scalar or has shape (B,).

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps that many of the most likely tokens; 0 keeps all.
      top_p: keeps the fewest tokens whose probabilities sum to at least this; 1 keeps all.
      min_p: keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
      repetition_penalty: makes tokens already in the row less likely; 1 changes nothing.
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0
    min_p: Array | float = 0.0
    repetition_penalty: Array | float = 1.0


def sample(logits_BV: Array, keys_B: Array, sampling: Sampling, seen_BV: Array) -> Array:
    """Draws one token per row: argmax(filtered logits + Gumbel noise), each row with its own key.

    The order is repetition penalty, temperature, top-k, top-p, min-p, as in transformers.

    Args:
      logits_BV: fp32 logits.
      keys_B: typed PRNG keys; a row's draw depends on its own key and logits only.
      sampling: the settings.
      seen_BV: booleans, which tokens the row already holds.

    Returns:
      (B,) int32 token ids.
    """
    penalty = jnp.asarray(sampling.repetition_penalty)
    logits_BV = jax.lax.cond(
        jnp.any(penalty != 1),
        lambda logits_BV: penalize_repetition(logits_BV, seen_BV, penalty),
        lambda logits_BV: logits_BV,
        logits_BV,
    )
    greedy_B = jnp.asarray(sampling.temperature) == 0
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled_BV = apply_temperature(logits_BV, jnp.where(greedy_B, 1.0, sampling.temperature))
        scaled_BV = keep_top_k(scaled_BV, sampling.top_k)
        scaled_BV = keep_top_p(scaled_BV, sampling.top_p)
        scaled_BV = keep_min_p(scaled_BV, sampling.min_p)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(greedy_B, likeliest_B, drawn_B)

    return jax.lax.cond(jnp.all(greedy_B), lambda: likeliest_B, draw)


def apply_temperature(logits_BV: Array, temperature: Array | float) -> Array:
    """Returns logits / temperature; the temperature must be positive."""
    return logits_BV / _column(temperature)


def keep_top_k(logits_BV: Array, k: Array | int) -> Array:
    """Sets all but the k largest logits to -inf; ties with the k-th stay, and 0 keeps all."""
    k_B1 = _column(k)

    def keep(logits_BV):
        last_B1 = jnp.clip(k_B1 - 1, 0, logits_BV.shape[-1] - 1)
        sorted_BV = _descending(logits_BV)
        bound_B1 = jnp.take_along_axis(sorted_BV, _rows(last_B1, logits_BV), axis=-1)
        return jnp.where((k_B1 > 0) & (logits_BV < bound_B1), -jnp.inf, logits_BV)

    return jax.lax.cond(jnp.any(k_B1 > 0), keep, lambda logits_BV: logits_BV, logits_BV)


def keep_top_p(logits_BV: Array, p: Array | float) -> Array:
    """Keeps the fewest tokens whose probability reaches p (nucleus; Holtzman et al., 2020).

    A token stays if those before it in order of probability sum to less than p, so the likeliest
    always does. Ties with the last that stays are kept too; 1 keeps all.
    """
    p_B1 = _column(p)

    def keep(logits_BV):
        sorted_BV = _descending(logits_BV)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        bound_B1 = jnp.min(jnp.where(before_BV < p_B1, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where((p_B1 < 1) & (logits_BV < bound_B1), -jnp.inf, logits_BV)

    return jax.lax.cond(jnp.any(p_B1 < 1), keep, lambda logits_BV: logits_BV, logits_BV)


def keep_min_p(logits_BV: Array, p: Array | float) -> Array:
    """Keeps tokens at least p times as likely as the likeliest (Nguyen et al., 2024); 0 is off."""
    bound_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits_BV < bound_B1, -jnp.inf, logits_BV)


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones (CTRL, 2019).

    Args:
      logits_BV: logits.
      seen_BV: booleans, which tokens to penalize.
      penalty: positive; above 1 discourages, 1 changes nothing.
    """
    penalty_B1 = _column(penalty)
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def _column(setting: Array | float) -> Array:
    """Returns a scalar or (B,) setting as (1, 1) or (B, 1)."""
    return jnp.asarray(setting).reshape(-1, 1)


def _rows(column: Array, like_BV: Array) -> Array:
    return jnp.broadcast_to(column, (like_BV.shape[0], 1))


def _descending(logits_BV: Array) -> Array:
    return -jnp.sort(-logits_BV, axis=-1)
