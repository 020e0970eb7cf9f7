"""Rotary position embedding (RoFormer, Su et al., 2021) and its frequency scalings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Stretches low frequencies by `factor` and leaves high ones alone (Llama 3.1, 2024).

    Attributes:
      factor: by how much the context was stretched.
      low_frequency_factor, high_frequency_factor: wavelengths longer than `original_length /
        low_frequency_factor` are stretched, shorter than `original_length /
        high_frequency_factor` are kept, and those between are interpolated.
      original_length: context length before the stretch, in tokens.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates pairs (i, i + H/2) of each head by position * theta^(-2i/H).

    Attributes:
      theta: base of the wavelengths.
      scaling: changes the frequencies, or None.
    """

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns `x_BTNH` rotated to its positions, in its own dtype; angles are fp32."""
        half = x_BTNH.shape[-1] // 2
        frequencies = self.theta ** (-np.arange(half, dtype=np.float64) / half)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles_BT1P = positions_BT[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)
        cos, sin = jnp.cos(angles_BT1P), jnp.sin(angles_BT1P)
        left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
        return rotated.astype(x_BTNH.dtype)
