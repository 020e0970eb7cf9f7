"""Norms, positions, embeddings, dropout and wiring against torch, closed forms and brute force."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context, positions_of
from lm.core.init import Normal, VarianceScaling
from lm.layers.block import Block, PostNorm, PreNorm
from lm.layers.dropout import Dropout
from lm.layers.embed import Embed, Entry
from lm.layers.head import Head, TiedHead
from lm.layers.mlp import GLU, MLP
from lm.layers.norm import LayerNorm, RMSNorm
from lm.layers.position import RelativeBias, SinusoidalPositions
from lm.models import params as P
from lm.models.families.teeny_gpt import teeny_gpt
from lm.models.stack import Stack

CTX = Context()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.ledger("B22")
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_equals_torch(eps):
    torch = pytest.importorskip("torch")
    x, scale, bias = draw(3, 5, 16) * 3 + 1, draw(16, seed=1), draw(16, seed=2)
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (16,), torch.from_numpy(scale), torch.from_numpy(bias), eps
    )
    ours = LayerNorm(eps).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6, rtol=1e-6)


@pytest.mark.ledger("N52")
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_equals_torch_and_its_formula(eps):
    torch = pytest.importorskip("torch")
    x, scale = draw(3, 5, 16) * 3 + 1, draw(16, seed=1)
    ours = RMSNorm(eps).apply({"params": {"scale": scale}}, x)
    theirs = torch.nn.RMSNorm(16, eps)
    theirs.weight.data = torch.from_numpy(scale)
    np.testing.assert_allclose(ours, theirs(torch.from_numpy(x)).detach(), atol=1e-6, rtol=1e-6)
    x64 = x.astype(np.float64)
    formula = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(ours, formula, atol=1e-6, rtol=1e-6)


def test_norms_keep_the_dtype_and_fp32_statistics():
    x = jnp.asarray(draw(2, 4, 512) * 100, jnp.bfloat16)
    for norm in (LayerNorm(), RMSNorm()):
        params = norm.init(jax.random.key(0), x)
        y = norm.apply(params, x)
        exact = norm.apply(params, x.astype(jnp.float32))
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.ledger("B23")
def test_sinusoidal_positions_equal_the_closed_form():
    """Both layouts; Marian's halves and the paper's pairs are a permutation of each other."""
    D = 8
    positions = jnp.asarray([[0, 1, 2, 77, 511]])
    halves = SinusoidalPositions().apply({}, positions, D)[0]
    pairs = SinusoidalPositions(interleaved=True).apply({}, positions, D)[0]
    for row, p in enumerate([0, 1, 2, 77, 511]):
        for i in range(D // 2):
            angle = p / 10000 ** (2 * i / D)
            # A float32 angle of 511 radians is itself rounded by 3e-5.
            tolerance = max(1e-6, p * 6e-8)
            assert abs(halves[row, i] - np.sin(angle)) <= tolerance
            assert abs(halves[row, D // 2 + i] - np.cos(angle)) <= tolerance
            assert abs(pairs[row, 2 * i] - np.sin(angle)) <= tolerance
            assert abs(pairs[row, 2 * i + 1] - np.cos(angle)) <= tolerance


@pytest.mark.ledger("B23")
def test_only_positions_break_permutation_equivariance():
    """Without a causal mask, permuted tokens give permuted logits unless there are positions."""
    model = teeny_gpt(num_layers=2, mlp_multiplier=4, num_heads=4, num_features=16)
    stack = model.stack.clone(entry=Entry(), parent=None)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 29)
    order = np.random.default_rng(0).permutation(10)
    for built, equivariant in ((model, False), (model.clone(stack=stack, parent=None), True)):
        params = P.init(built, jax.random.key(0))
        ctx = Context(causal=False)
        apply = jax.jit(built.apply)
        straight, _ = apply({"params": params}, tokens, ctx)
        permuted, _ = apply({"params": params}, tokens[:, order], ctx)
        error = float(jnp.abs(permuted - straight[:, order]).max())
        assert (error <= 1e-5) == equivariant, error


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_transformers(bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-300, 301)
    expected = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    ours = RelativeBias(4, bidirectional=bidirectional).buckets(jnp.asarray(distance))
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.ledger("B10")
def test_embedding_is_a_one_hot_product():
    """E[ids] equals one_hot(ids) E exactly, and the gradients of both forms agree."""
    table, ids = jnp.asarray(draw(11, 8)), jnp.asarray([[1, 5, 5], [0, 10, 3]])
    weights = jnp.asarray(draw(2, 3, 8, seed=3))
    embed = Embed(11, 8)

    def looked_up(table):
        return embed.apply({"params": {"table": table}}, ids, CTX)

    def product(table):
        return jax.nn.one_hot(ids, 11) @ table

    np.testing.assert_array_equal(looked_up(table), product(table))
    grads = [jax.grad(lambda t, f=f: (f(t) * weights).sum())(table) for f in (looked_up, product)]
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-6)


class _Uses(nn.Module):
    """An embedding and a head, for tests of tying."""

    embed: nn.Module
    head: nn.Module

    def __call__(self, ids):
        return self.head(self.embed(ids, CTX), self.embed, CTX)


@pytest.mark.ledger("N53")
def test_tied_head():
    """Tying saves exactly V D parameters; the table's gradient is the sum of both uses."""
    V, D = 13, 8
    ids = jnp.asarray([[1, 5, 5, 12]])
    weights = jnp.asarray(draw(1, 4, V))
    tied, untied = _Uses(Embed(V, D), TiedHead()), _Uses(Embed(V, D), Head(V))
    count = {m: P.count(nn.unbox(m.init(jax.random.key(0), ids))["params"]) for m in (tied, untied)}
    assert count[untied] - count[tied] == V * D
    table = jnp.asarray(draw(V, D))

    def total(model, params):
        return (model.apply({"params": params}, ids) * weights).sum()

    both = jax.grad(lambda t: total(tied, {"embed": {"table": t}}))(table)
    apart = jax.grad(lambda p: total(untied, p))(
        {"embed": {"table": table}, "head": {"kernel": table.T}}
    )
    summed = apart["embed"]["table"] + apart["head"]["kernel"].T
    np.testing.assert_allclose(both, summed, atol=1e-6)


def test_feed_forwards_equal_their_formulas():
    x = draw(2, 3, 8)
    up, gate, down = draw(8, 12), draw(8, 12, seed=1), draw(12, 8, seed=2)
    b1, b2 = draw(12, seed=3), draw(8, seed=4)
    params = {"up": {"kernel": up, "bias": b1}, "down": {"kernel": down, "bias": b2}}
    ours, _ = MLP(12, "relu").apply({"params": params}, x, CTX)
    np.testing.assert_allclose(ours, np.maximum(x @ up + b1, 0) @ down + b2, atol=1e-5)
    params = {"up": {"kernel": up}, "gate": {"kernel": gate}, "down": {"kernel": down}}
    ours, _ = GLU(12).apply({"params": params}, x, CTX)
    g = x @ gate
    np.testing.assert_allclose(ours, (g / (1 + np.exp(-g)) * (x @ up)) @ down, atol=1e-5)


def test_dropout():
    """Keeps the mean, drops at its rate, is off when deterministic, and differs by layer."""
    x = jnp.ones((100, 1000))
    drop = Dropout(0.25)
    y = drop.apply({}, x, Context(deterministic=False), rngs={"dropout": jax.random.key(0)})
    dropped = float((y == 0).mean())
    assert abs(dropped - 0.25) < 5 * np.sqrt(0.25 * 0.75 / x.size)
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)
    np.testing.assert_array_equal(drop.apply({}, x, Context()), x)

    class Zero(nn.Module):
        def __call__(self, x, ctx, state=None):
            return jnp.ones_like(x), state

    block = Block(PreNorm(Zero(), LayerNorm(), dropout=0.5))
    model = Stack((block, block), 2)
    zeros = jnp.zeros((1, 4, 64))
    params = model.init(jax.random.key(0), zeros, Context())
    rngs = {"dropout": jax.random.key(0)}
    y, _ = model.apply(params, zeros, Context(deterministic=False), rngs=rngs)
    # Four independent layers each add 0 or 2: equal masks would leave only 0 and 8.
    assert set(np.unique(y)) == {0.0, 2.0, 4.0, 6.0, 8.0}


def test_one_module_value_used_twice_owns_its_parameters_twice():
    """Linen alone would tie them, silently."""
    norm, mlp = LayerNorm(), MLP(8)
    once = Stack((Block(PreNorm(mlp, norm)),), 2)
    twice = Stack((Block(PreNorm(mlp, norm), PostNorm(mlp, norm)),), 2)
    pattern = Stack((Block(PreNorm(mlp, norm)), Block(PreNorm(mlp, norm))), 2)
    x = jnp.zeros((1, 3, 4))
    counts = [
        P.count(nn.unbox(m.init(jax.random.key(0), x, CTX))["params"])
        for m in (once, twice, pattern)
    ]
    assert counts == [counts[0], 2 * counts[0], 2 * counts[0]]
    blocks = nn.unbox(pattern.init(jax.random.key(0), x, CTX))["params"]["pattern"]
    first, second = (blocks[f"blocks_{i}"]["mixer"]["layer"]["up"]["kernel"] for i in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "init, fan_in, variance",
    [
        (Normal(0.3), 1, 0.09),
        (VarianceScaling(), 64, 1 / 64),
        (VarianceScaling(1 / 3, "in", "uniform"), 64, 1 / 192),
        (VarianceScaling(1.0, "average", "uniform"), 64, 2 / (64 + 512)),
    ],
)
def test_initializers_have_their_variance(init, fan_in, variance):
    x = init(jax.random.key(0), (64, 512), jnp.float32, fan_in)
    assert abs(float(x.var()) / variance - 1) < 5 * np.sqrt(2 / x.size)
    assert abs(float(x.mean())) < 5 * np.sqrt(variance / x.size)
    if getattr(init, "distribution", "") == "uniform":
        assert float(jnp.abs(x).max()) <= np.sqrt(3 * variance)


def test_positions_restart_in_each_segment():
    segments = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0]])
    assert positions_of(segments).tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 1, 0]]


def test_sequences_beyond_the_positions_are_refused():
    model = teeny_gpt(max_length=8, num_layers=1, mlp_multiplier=4)
    params = P.init(model, jax.random.key(0))
    tokens = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(ValueError, match="positions for 8 tokens"):
        model.apply({"params": params}, tokens)
    with pytest.raises(ValueError, match="causal"):
        model.apply({"params": params}, tokens[:, :4], Context(cache_length=8, causal=False))
    with pytest.raises(ValueError, match="remat"):
        model.apply({"params": params}, tokens[:, :4], Context(remat="some"))
