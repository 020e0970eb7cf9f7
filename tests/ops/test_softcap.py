"""The soft cap against its closed form; inside of attention it is checked in test_flash.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.softcap import soft_cap, soft_cap_slope


@pytest.mark.ledger("L52")
@pytest.mark.parametrize("cap", [0.1, 1.0, 30.0, 50.0])
def test_closed_form_gradient_and_bounds(cap):
    x = np.random.default_rng(0).standard_normal(1000) * 3 * cap
    x = np.concatenate([x, [0.0, cap, -cap, 1e3 * cap, -1e30]]).astype(np.float32)
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    capped = soft_cap(jnp.asarray(x), cap)
    np.testing.assert_allclose(capped, expected, atol=1e-6 * cap)
    assert (np.abs(np.asarray(capped, np.float64)) < cap).all()
    grad = jax.jit(jax.grad(lambda x: soft_cap(x, cap).sum()))(jnp.asarray(x))
    slope = 1 / np.cosh(np.minimum(np.abs(x.astype(np.float64) / cap), 300)) ** 2
    np.testing.assert_allclose(grad, slope, atol=1e-6)
    np.testing.assert_allclose(soft_cap_slope(capped, cap), slope, atol=1e-6)


def test_no_cap_changes_nothing():
    x = jnp.arange(3.0)
    assert soft_cap(x, None) is x
