"""How far a layer, and a stack of them, sees: where the Jacobian is not zero."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.models import params as P
from lm.models.families.gpt2 import gpt2
from lm.models.families.llama import FAMILY as LLAMA

T, D, W = 18, 16, 4


def support(module, params):
    """Returns (T, T) booleans: whether the output at a place depends on the input at another."""
    ctx = Context(causal=True, positions_BT=jnp.arange(T)[None])

    def out(x_TD):
        return module.apply({"params": params}, x_TD[None], ctx, None)[0][0]

    x_TD = jax.random.normal(jax.random.key(1), (T, D))
    jacobian = jax.jit(jax.jacrev(out))(x_TD)
    return np.asarray(jnp.abs(jacobian).max(axis=(1, 3))) > 0


def band(width):
    distance = np.arange(T)[:, None] - np.arange(T)
    return (distance >= 0) & (distance < width)


@pytest.mark.ledger("L28")
def test_layers_alternate_between_all_and_a_band():
    """Even layers see all that is before them, odd ones a band of it: exactly."""
    model = gpt2(31, T, D, num_heads=2, num_layers=4, window=W)
    params = P.init(model, jax.random.key(0))["stack"]["pattern"]
    for layer in range(4):
        block = model.stack.pattern.blocks[layer % 2]
        own = jax.tree.map(itemgetter(layer // 2), params[f"blocks_{layer % 2}"])
        expected = band(T if layer % 2 == 0 else W)
        np.testing.assert_array_equal(support(block, own), expected)


@pytest.mark.ledger("L41")
@pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_receptive_field_grows_by_a_window_each_layer(layers):
    """After L layers of a window of W a place depends on L (W - 1) before it, and on no more."""
    sizes = dict(num_features=D, mlp_features=24, num_layers=layers, window=W)
    model = LLAMA.build(**{**LLAMA.tiny, **sizes})
    params = P.init(model, jax.random.key(0))["stack"]
    found = support(model.stack, params)
    np.testing.assert_array_equal(found, band(layers * (W - 1) + 1))


@pytest.mark.slow
@pytest.mark.ledger("L41")
def test_a_window_equals_dense_attention_with_a_band():
    """The mixer of a windowed model against softmax over the band, written out."""
    model = LLAMA.build(**{**LLAMA.tiny, "window": W, "num_features": D, "num_layers": 1})
    mixer = model.stack.pattern.blocks[0].mixer.layer
    params = P.init(model, jax.random.key(0))["stack"]["pattern"]["blocks_0"]["mixer"]["layer"]
    params = jax.tree.map(lambda leaf: 5 * leaf[0], params)
    x = jax.random.normal(jax.random.key(1), (2, T, D))
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    ctx = Context(causal=True, positions_BT=positions)
    ours, _ = jax.jit(partial(mixer.apply, state=None))({"params": params}, x, ctx)

    q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"]) for name in "qkv")
    q, k = (mixer.rotary(y, positions) for y in (q, k))
    k, v = (y.repeat(q.shape[2] // k.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(band(W), scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    expected = jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"])
    np.testing.assert_allclose(ours, expected, atol=1e-6)
