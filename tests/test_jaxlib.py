"""The builds of jaxlib that compute wrong sums on CPU are excluded, refused, and recognised."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from lm.core.runtime import WRONG_SUMS_ON_CPU, check_jaxlib

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("width", [2, 3, 5])
def test_jitted_sums_of_squares_are_right(width):
    """The reproducer of jax issue 39103: from 32769 rows on, the bad builds are off by 0.8 %.

    Row n is (n, 0, ..., 0), so its sum of squares is n^2, which fp32 holds exactly up to 4096 and
    at powers of two, and to half a unit in the last place elsewhere.
    """
    num_rows = 32769
    x = jnp.zeros((num_rows, width)).at[:, 0].set(jnp.arange(num_rows, dtype=jnp.float32))

    def sum_of_squares(x):
        return jax.vmap(lambda row: jnp.square(jnp.eye(width) @ row).sum())(x)

    exact = np.arange(num_rows, dtype=np.float64) ** 2
    jitted = np.asarray(jax.jit(sum_of_squares)(x), np.float64)
    np.testing.assert_array_equal(jitted, exact.astype(np.float32))
    np.testing.assert_array_equal(jitted, np.asarray(sum_of_squares(x)))
    assert jitted[-1] == 2.0**30


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0"])
def test_the_bad_builds_are_refused_on_cpu(version):
    with pytest.raises(ValueError, match=rf"jaxlib {version} computes wrong sums on CPU"):
        check_jaxlib("cpu", version)
    check_jaxlib("gpu", version)
    check_jaxlib("tpu", version)


@pytest.mark.parametrize("version", ["0.10.1", "0.11.2", "0.12.0", ""])
def test_other_builds_are_not(version):
    check_jaxlib("cpu", version)


def test_the_installation_excludes_them():
    """`setup.py` names the same builds, and leaves any other recent jax alone."""
    (text,) = re.findall(r'^JAX = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    specifier = SpecifierSet(text)
    assert not any(version in specifier for version in WRONG_SUMS_ON_CPU)
    assert all(version in specifier for version in ("0.10.1", "0.11.2", "0.13.0", "1.0.0"))
    assert "0.9.2" not in specifier
