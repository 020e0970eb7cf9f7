"""Parameters as a CPU's decoding loop has them: the same model, and a copy that is made once."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.paths import flatten
from lm.infer import decoding
from lm.infer.decoding import lay_apart
from lm.models import adapters
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.families.llama import FAMILY
from lm.models.kernels import kernels, turn
from tests.conformance.harness import random_params

MODEL = FAMILY.build(**FAMILY.tiny)
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it is no copy")


@pytest.mark.parametrize("rows, length", [(1, 1), (3, 1), (4, 40)])
@pytest.mark.parametrize("adapter", [None, LoRA(2, targets=("*/kernel",), dora=True)])
def test_turned_kernels_are_the_same_model(rows, length, adapter):
    """One row, few and many, each another product; beside adapters that read the kernel, too."""
    params = random_params(MODEL)
    if adapter is not None:
        params = adapters.add(MODEL, params, adapter, jax.random.key(2))
        factors = {path for path in flatten(params) if path.endswith("lora_b")}
        assert len(factors) == len(kernels(MODEL))
    turned = turn(MODEL, params)
    assert not set(kernels(MODEL)) & set(flatten(turned))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (rows, length))
    apply = jax.jit(lambda params: MODEL.apply({"params": params}, jnp.asarray(tokens))[0])
    expected = apply(params)
    np.testing.assert_allclose(apply(turned), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_copy_is_made_once_and_goes_with_its_origin():
    params = P.init(MODEL, jax.random.key(0))
    made = lay_apart(MODEL, params)
    assert lay_apart(MODEL, dict(params)) is made
    assert lay_apart(MODEL, params, "bfloat16") is not made
    other = jax.tree.map(jnp.copy, params)
    changed = lay_apart(MODEL, jax.tree.map(lambda x: x + 1, other))
    assert changed is not made and not decoding._latest, "what it was made of is gone"
    made = lay_apart(MODEL, other)
    assert decoding._latest
    del other, made
    gc.collect()
    assert not decoding._latest


def test_what_may_change_in_place_is_not_remembered():
    params = jax.tree.map(np.array, P.init(MODEL, jax.random.key(0)))
    first = lay_apart(MODEL, params)
    for leaf in flatten(params).values():
        leaf += 1
    second = lay_apart(MODEL, params)
    old, new = (jax.tree.leaves(tree["stack"]["pattern"]) for tree in (first, second))
    assert all((np.asarray(b) - np.asarray(a) > 0.5).all() for a, b in zip(old, new))
    assert not decoding._latest
