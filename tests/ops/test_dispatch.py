"""Tokens to experts and back, on one device and on eight, against a loop over tokens."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.mesh import MeshShape, make_mesh
from lm.ops.dispatch import capacity, grouped_product, through_choosing_experts, through_experts
from lm.ops.routing import route

T, D, F, GROUPS = 32, 6, 5, 8
MESHES = {
    "one": None,
    "expert 2": MeshShape(data=2, fsdp=2, expert=2),
    "expert 4": MeshShape(data=2, expert=4),
    "expert 8": MeshShape(expert=8),
    "tensor": MeshShape(data=2, expert=2, tensor=2),
}


def draw(num_experts, seed=0):
    """Returns tokens, logits that favour some experts, parameters, a cotangent and a mask."""
    rng = np.random.default_rng(seed)
    x_TD = rng.normal(size=(T, D))
    logits_TE = rng.normal(size=(T, num_experts)) + np.linspace(1.5, 0, num_experts)
    params = {
        "up": rng.normal(size=(num_experts, D, F)) / 2,
        "down": rng.normal(size=(num_experts, F, D)) / 2,
    }
    return x_TD, logits_TE, params, rng.normal(size=(T, D)), rng.random(T) < 0.8


def mlp(params, x_RD, counts_E):
    """Experts of two kernels each, with tanh between."""
    hidden_RF = jnp.tanh(grouped_product(x_RD, params["up"], counts_E))
    return grouped_product(hidden_RF, params["down"], counts_E)


class Loop:
    """One token after the other in fp64: outputs, and the gradients of sum(outputs * cotangent)."""

    def __init__(self, x_TD, logits_TE, params, cotangent_TD):
        self.x_TD, self.params, self.cotangent_TD = x_TD, params, cotangent_TD
        exponentials_TE = np.exp(logits_TE)
        self.probs_TE = exponentials_TE / exponentials_TE.sum(1, keepdims=True)
        self.out_TD, self.dropped = np.zeros_like(x_TD), 0
        self.grad_x, self.grad_probs = np.zeros_like(x_TD), np.zeros_like(logits_TE)
        self.grads = {name: np.zeros_like(leaf) for name, leaf in params.items()}

    def visit(self, t, e, weight):
        """Adds weight expert_e(x_t) to the output; returns the gradient of the weight."""
        x, up, down = self.x_TD[t], self.params["up"][e], self.params["down"][e]
        hidden = np.tanh(x @ up)
        self.out_TD[t] += weight * (hidden @ down)
        grad = weight * self.cotangent_TD[t]
        self.grads["down"][e] += np.outer(hidden, grad)
        grad_inner = (down @ grad) * (1 - hidden**2)
        self.grads["up"][e] += np.outer(x, grad_inner)
        self.grad_x[t] += up @ grad_inner
        return hidden @ down @ self.cotangent_TD[t]

    def tokens_choose(self, k, normalise, places, groups, mask_T):
        """Visits the k best experts of each token, as long as they have places."""
        size = T // groups
        grad_weights = np.zeros((T, k))
        chosen = [sorted(range(len(p)), key=lambda e: (-p[e], e))[:k] for p in self.probs_TE]  # noqa: B023
        sums = [sum(p[e] for e in row) if normalise else 1 for p, row in zip(self.probs_TE, chosen)]
        for group in range(groups):
            room = [math.inf if places is None else places] * self.probs_TE.shape[1]
            for j in range(k):
                for t in range(group * size, (group + 1) * size):
                    e = chosen[t][j]
                    if mask_T[t] and room[e] == 0:
                        self.dropped += 1
                    elif mask_T[t]:
                        room[e] -= 1
                        weight = self.probs_TE[t, e] / sums[t]
                        grad_weights[t, j] = self.visit(t, e, weight)
        for t in range(T):
            weights = self.probs_TE[t, chosen[t]] / sums[t]
            shared = grad_weights[t] @ weights if normalise else 0
            self.grad_probs[t, chosen[t]] = (grad_weights[t] - shared) / sums[t]
        return self

    def experts_choose(self, places, groups, mask_T):
        """Visits the best tokens of each expert in each group."""
        size = T // groups
        for group in range(groups):
            tokens = [t for t in range(group * size, (group + 1) * size) if mask_T[t]]
            for e in range(self.probs_TE.shape[1]):
                for t in sorted(tokens, key=lambda t: (-self.probs_TE[t, e], t))[:places]:  # noqa: B023
                    self.grad_probs[t, e] += self.visit(t, e, self.probs_TE[t, e])
        return self

    def results(self):
        """Returns outputs and the gradients of tokens, logits and parameters."""
        inner = (self.grad_probs * self.probs_TE).sum(1, keepdims=True)
        grad_logits = self.probs_TE * (self.grad_probs - inner)
        return self.out_TD, (self.grad_x, grad_logits, self.grads)


def place(mesh, x_TD, logits_TE, params):
    """Returns them in fp32, laid out as a batch and parameters are."""
    rows, experts = PartitionSpec(("data", "fsdp")), PartitionSpec("expert")

    def put(leaf, spec):
        return jax.device_put(np.float32(leaf), NamedSharding(mesh, spec))

    return put(x_TD, rows), put(logits_TE, rows), {n: put(p, experts) for n, p in params.items()}


def with_gradients(function, mesh, drawn):
    """Returns the output of function(x, logits, params, mask), its count, and the gradients."""
    x_TD, logits_TE, params, cotangent_TD, mask_T = drawn

    def loss(x_TD, logits_TE, params):
        out_TD, count = function(x_TD, logits_TE, params, jnp.asarray(mask_T))
        return (out_TD * np.float32(cotangent_TD)).sum(), (out_TD, count)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (_, (out_TD, count)), grads = compiled(*place(mesh, x_TD, logits_TE, params))
    return out_TD, int(count), grads


def assert_equal(ours, theirs):
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), ours, theirs)


QUICK = [
    (1, 4, "one"),
    (2, 8, "expert 4"),
]
CASES = [
    pytest.param(k, E, mesh, marks=() if (k, E, mesh) in QUICK else pytest.mark.slow)
    for k in (1, 2, 4)
    for E in (4, 8)
    for mesh in MESHES
    if E == 8 or mesh != "expert 8"
]


@pytest.mark.parametrize("factor", [1.0, None], ids=["capacity", "dropless"])
@pytest.mark.parametrize("k, num_experts, mesh", CASES)
def test_tokens_choose(k, num_experts, mesh, factor):
    """Outputs, dropped choices and all gradients, whatever the devices."""
    normalise = k > 1
    drawn = draw(num_experts)
    places = None if factor is None else math.ceil(factor * k * T / GROUPS / num_experts)
    loop = Loop(*drawn[:4]).tokens_choose(k, normalise, places, GROUPS, drawn[4])
    assert (loop.dropped > 0) == (factor is not None and k < num_experts)

    def ours(x_TD, logits_TE, params, mask_T):
        routes = route(logits_TE, k, normalise)
        options = dict(capacity_factor=factor, groups=GROUPS, mask_T=mask_T)
        return through_experts(mlp, params, x_TD, routes, **options)

    shape = MESHES[mesh]
    out_TD, dropped, grads = with_gradients(ours, shape and make_mesh(shape), drawn)
    assert dropped == loop.dropped
    assert_equal((out_TD, grads), loop.results())


@pytest.mark.parametrize(
    "mesh", ["one", "expert 4", pytest.param("expert 2", marks=pytest.mark.slow)]
)
def test_experts_choose(mesh):
    drawn = draw(8, seed=1)
    places = math.ceil(2.0 * T / GROUPS / 8)
    loop = Loop(*drawn[:4]).experts_choose(places, GROUPS, drawn[4])

    def ours(x_TD, logits_TE, params, mask_T):
        options = dict(capacity_factor=2.0, groups=GROUPS, mask_T=mask_T)
        return through_choosing_experts(mlp, params, x_TD, logits_TE, **options), 0

    shape = MESHES[mesh]
    out_TD, _, grads = with_gradients(ours, shape and make_mesh(shape), drawn)
    assert_equal((out_TD, grads), loop.results())


# --- what travels, and what is kept ----------------------------------------------------------


def compile_dispatch(num_tokens, num_experts, k, factor, shape, groups, gradient=True):
    """Returns the program of outputs or gradients, compiled for shapes alone."""
    mesh = make_mesh(shape) if shape else make_mesh(devices=jax.devices()[:1])

    def out(x_TD, logits_TE, params):
        options = dict(capacity_factor=factor, groups=groups)
        return through_experts(mlp, params, x_TD, route(logits_TE, k), **options)[0]

    def loss(*args):
        return (out(*args) ** 2).sum()

    def shape_of(spec, *sizes):
        sharding = NamedSharding(mesh, PartitionSpec(spec))
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

    rows = ("data", "fsdp")
    params = {
        "up": shape_of("expert", num_experts, D, F),
        "down": shape_of("expert", num_experts, F, D),
    }
    function = jax.grad(loss, (0, 1, 2)) if gradient else out
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        args = shape_of(rows, num_tokens, D), shape_of(rows, num_tokens, num_experts), params
        return jax.jit(function).lower(*args).compile()


def sent(compiled, dtype="f32"):
    """Returns the bytes of each all-to-all of a dtype that a device takes part in."""
    found = []
    for result in re.findall(r"= (.*?) all-to-all\(", compiled.as_text()):
        shapes = re.findall(rf"\b{dtype}\[([\d,]*)\]", result)
        found += [4 * sum(math.prod(map(int, shape.split(","))) for shape in shapes)]
    return [size for size in found if size]


@pytest.mark.parametrize("name", ["expert 4", pytest.param("expert 2", marks=pytest.mark.slow)])
def test_bytes_of_an_all_to_all(name):
    """Rows go and come by one each way; so do their gradients. Nothing else is f32."""
    shape = MESHES[name]
    assert shape is not None
    E, K, size = 8, 2, shape.expert
    own_tokens = T // 8
    places = math.ceil(1.25 * K * own_tokens / E)
    fixed = compile_dispatch(T, E, K, 1.25, shape, GROUPS)
    assert sent(fixed) == [4 * E * places * D] * 4
    free = compile_dispatch(T, E, K, None, shape, GROUPS)
    rows = size * own_tokens * min(K, E // size)
    assert sent(free) == [4 * rows * D] * 4
    assert set(sent(free, "s32")) == {4 * E}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.25, pytest.param(None, marks=pytest.mark.slow)])
def test_memory_is_linear_in_tokens(factor):
    """Four times the tokens take four times the temporaries; a one-hot tensor takes 16 times."""
    small, large = (
        compile_dispatch(tokens, 8, 2, factor, None, 1).memory_analysis().temp_size_in_bytes
        for tokens in (512, 2048)
    )
    assert 3 < large / small < 4.5


def test_capacity():
    assert capacity(32, 1, 8, 2, 1.0) == 8
    assert capacity(32, 4, 8, 2, 1.25) == 3
    assert capacity(100, 1, 10, 1, 1.1) == 11
    assert capacity(32, 8, 4, 1, 100.0) == 4
    assert capacity(32, 8, 8, 1, 0.1) == 1


def test_refusals():
    x_TD, logits_TE, params, *_ = draw(4)
    routes = route(jnp.asarray(logits_TE), 2)
    with pytest.raises(ValueError, match="32 tokens do not divide over 5 groups"):
        through_experts(mlp, params, x_TD, routes, capacity_factor=1.0, groups=5)
    mesh = make_mesh(MESHES["expert 8"]).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(ValueError, match="4 groups do not divide over the 8 devices"):
            through_experts(mlp, params, x_TD, routes, capacity_factor=1.0, groups=4)
        with pytest.raises(ValueError, match="4 experts do not divide over expert=8 devices"):
            through_experts(mlp, params, x_TD, routes)
        routes = route(jnp.asarray(draw(8)[1][:30]), 2)
        with pytest.raises(ValueError, match="30 tokens do not divide over the 8 devices"):
            through_experts(mlp, draw(8)[2], x_TD[:30], routes)
