"""The forms of a linear recurrence equal a plain loop, gradients too, and so does the conv."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.conv import causal_conv, continue_conv
from lm.ops.recurrence import associative, chunked, in_chunks, restarts, selective_scan, sequential

B, T, F, P, K = 2, 23, 6, 4, 4
FORMS = {
    "sequential": sequential,
    "associative": associative,
    "one chunk": chunked,
    "chunks and a rest": partial(chunked, chunk=5),
    "chunks of one": partial(chunked, chunk=1),
    "even chunks": partial(chunked, chunk=T),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", FORMS)
def test_forms_equal_a_loop(name):
    a, b, h = jax.nn.sigmoid(normal(B, T, F)), normal(B, T, F, seed=1), normal(B, F, seed=2)
    last, states = FORMS[name](a, b, h)
    expected = np.asarray(h, np.float64)
    for t in range(T):
        expected = np.asarray(a[:, t], np.float64) * expected + np.asarray(b[:, t])
        np.testing.assert_allclose(states[:, t], expected, atol=1e-5)
    np.testing.assert_array_equal(last, states[:, -1])


@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_forms_are_equal(name):
    inputs = jax.nn.sigmoid(normal(B, T, F)), normal(B, T, F, seed=1), normal(B, F, seed=2)
    weights = normal(B, T, F, seed=3)

    def loss(form, inputs):
        last, states = form(*inputs)
        return (weights * states**2).sum() + (last**3).sum()

    reference = jax.grad(partial(loss, sequential))(inputs)
    for ours, theirs in zip(jax.grad(partial(loss, FORMS[name]))(inputs), reference):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("name", FORMS)
def test_what_comes_later_leaves_a_state_bitwise_alone(name):
    form = jax.jit(FORMS[name])
    a, b, h = jax.nn.sigmoid(normal(B, T, F)), normal(B, T, F, seed=1), normal(B, F, seed=2)
    before = form(a, b, h)[1]
    for j in range(T):
        after = form(a.at[:, j].add(0.5), b.at[:, j].add(1.0), h)[1]
        np.testing.assert_array_equal(before[:, :j], after[:, :j])
        assert (before[:, j] != after[:, j]).any()


def test_chunks_bound_what_the_backward_pass_keeps():
    """Of the chunks, only the carries between them are saved: nothing of the size of the whole."""

    def loss(x):
        def step(carry, chunk):
            wide = jnp.exp(chunk[..., None] * jnp.arange(1.0, 101.0))
            carry = carry + wide.sum(1)
            return carry, jnp.sin(wide).sum(-1)

        return in_chunks(step, jnp.zeros((B, F, 100)), x, 4)[1].sum()

    closed = jax.make_jaxpr(jax.grad(loss))(normal(B, 64, F))
    sizes = [v.aval.size for eqn in closed.eqns for v in eqn.outvars]
    assert max(sizes) <= B * F * 100 * 16  # 16 carries; all the wide arrays would be 4 times that.


def scan_inputs(length=T):
    return dict(
        x_BTF=normal(B, length, F),
        dt_BTF=jax.nn.softplus(normal(B, length, F, seed=1)),
        A_FP=-jnp.exp(normal(F, P, seed=2)),
        B_BTP=normal(B, length, P, seed=3),
        C_BTP=normal(B, length, P, seed=4),
        D_F=normal(F, seed=5),
    )


def selective_loop(x_BTF, dt_BTF, A_FP, B_BTP, C_BTP, D_F, h_BFP):
    """Algorithm 2 of the paper, place by place, in float64."""
    x, dt, A, Bs, Cs, D, h = (
        np.asarray(v, np.float64) for v in (x_BTF, dt_BTF, A_FP, B_BTP, C_BTP, D_F, h_BFP)
    )
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for f in range(F):
            h[:, f] *= np.exp(dt[:, t, f, None] * A[f])
            h[:, f] += dt[:, t, f, None] * Bs[:, t] * x[:, t, f, None]
            y[:, t, f] = (h[:, f] * Cs[:, t]).sum(-1) + D[f] * x[:, t, f]
    return y, h


SCANS = [("sequential", 64), ("sequential", 5), ("associative", 64), ("associative", 5)]


@pytest.mark.parametrize("form, chunk", SCANS)
def test_selective_scan_equals_a_loop(form, chunk):
    inputs = scan_inputs()
    initial = normal(B, P, F, seed=6)
    y, last = selective_scan(**inputs, initial_BPF=initial, form=form, chunk=chunk)
    expected, h = selective_loop(**inputs, h_BFP=np.moveaxis(initial, 1, 2).copy())
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(np.moveaxis(last, 1, 2), h, atol=1e-4)


@pytest.mark.parametrize("form, chunk", SCANS[1:])
def test_selective_scan_gradients_are_equal(form, chunk):
    inputs = scan_inputs() | dict(initial_BPF=normal(B, P, F, seed=6))
    weights = normal(B, T, F, seed=7)

    def loss(form, chunk, inputs):
        y, last = selective_scan(**inputs, form=form, chunk=chunk)
        return (weights * y).sum() + (last**2).sum()

    reference = jax.grad(partial(loss, *SCANS[0]))(inputs)
    for name, grad in jax.grad(partial(loss, form, chunk))(inputs).items():
        atol = 1e-5 * float(jnp.abs(reference[name]).max())
        np.testing.assert_allclose(grad, reference[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("form, chunk", SCANS)
def test_selective_scan_restarts(form, chunk):
    """Two documents in one row, with padding of dt 0 around them, are as each alone."""
    inputs = scan_inputs()
    segments = jnp.asarray([[0, 0] + [1] * 8 + [2] * 10 + [0] * 3] * B)
    inputs["dt_BTF"] = jnp.where(segments[..., None] != 0, inputs["dt_BTF"], 0.0)
    y, last = selective_scan(**inputs, restart_BT=restarts(segments), form=form, chunk=chunk)
    for part in (slice(2, 10), slice(10, 20)):
        alone = {k: v[:, part] if "T" in k.split("_")[1] else v for k, v in inputs.items()}
        expected, h = selective_scan(**alone, form="sequential")
        np.testing.assert_allclose(y[:, part], expected, atol=1e-5)
    np.testing.assert_allclose(last, h, atol=1e-5)


@pytest.mark.perf
@pytest.mark.parametrize("form", ["sequential", "associative"])
def test_memory_of_a_scan_is_linear_in_the_length(form):
    """Bytes of temporaries of forward and backward, by XLA; all states at once would be 16 F."""
    batch, features, states = 2, 32, 16

    def temporaries(length):
        def loss(x, dt, A, B, C, D):
            return selective_scan(x, dt, A, B, C, D, form=form, chunk=64)[0].sum()

        wide, narrow = ((batch, length, n) for n in (features, states))
        shapes = (wide, wide, (features, states), narrow, narrow, (features,))
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, tuple(range(6)))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large <= 4.1 * small
    assert large < 4 * batch * 4096 * features * states / 2


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="sequential or associative, not 'parallel'"):
        selective_scan(**scan_inputs(), form="parallel")


def test_restarts():
    segments = jnp.asarray([[0, 1, 1, 0, 1, 2, 0, 0, 3], [2, 2, 1, 0, 0, 1, 1, 4, 4]])
    expected = [[0, 1, 0, 0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(restarts(segments), np.asarray(expected, bool))
    continued = restarts(segments, jnp.asarray([1, 2]))
    assert not continued[0, 1] and not continued[1, 0]


def test_conv_equals_torch():
    torch = pytest.importorskip("torch")
    x, kernel = normal(B, T, F), normal(F, K, seed=1)
    theirs = torch.nn.functional.conv1d(
        torch.from_numpy(np.moveaxis(np.array(x), 1, 2).copy()),
        torch.from_numpy(np.array(kernel))[:, None],
        padding=K - 1,
        groups=F,
    )[..., :T]
    np.testing.assert_allclose(causal_conv(x, kernel), np.moveaxis(theirs.numpy(), 1, 2), atol=1e-5)


def test_conv_of_packed_documents_equals_each_alone():
    x, kernel = normal(B, T, F), normal(F, K, seed=1)
    segments = jnp.asarray([[0, 0, 1, 1, 2] + [3] * 15 + [0] * 3] * B)
    y = causal_conv(x, kernel, segments)
    for part in (slice(2, 4), slice(4, 5), slice(5, 20)):
        np.testing.assert_allclose(y[:, part], causal_conv(x[:, part], kernel), atol=1e-6)


@pytest.mark.parametrize("cuts", [(0, 9, 23), (0, 1, 2, 3, 12, 13, 23), tuple(range(24))])
def test_conv_continues_over_padding(cuts):
    """In pieces, with padding anywhere, the tokens get what they get in one piece without it."""
    kernel = normal(F, K, seed=1)
    valid = np.random.default_rng(5).random((B, T)) < 0.6
    valid[0, :4] = False
    x = normal(B, T, F)
    tail, before, pieces = jnp.zeros((B, K - 1, F)), jnp.zeros(B, jnp.int32), []
    for start, stop in pairwise(cuts):
        segments = jnp.asarray(valid[:, start:stop].astype(np.int32))
        y, tail = continue_conv(x[:, start:stop], kernel, segments, tail, before)
        before = jnp.maximum(before, segments.max(1))
        pieces.append(y)
    together = jnp.concatenate(pieces, 1)
    for row in range(B):
        alone = x[row : row + 1, valid[row]]
        expected = causal_conv(alone, kernel)[0]
        np.testing.assert_allclose(together[row, valid[row]], expected, atol=1e-6)
        np.testing.assert_array_equal(tail[row], alone[0, -(K - 1) :])


def test_conv_tail_is_of_the_last_document():
    x, kernel = normal(B, 6, F), normal(F, K, seed=1)
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2]] * B)
    tail = jnp.zeros((B, K - 1, F))
    _, tail = continue_conv(x, kernel, segments, tail, jnp.zeros(B, jnp.int32))
    np.testing.assert_array_equal(tail, x[:, 3:].at[:, 0].set(0))
    new = normal(B, 1, F, seed=3)
    three = jnp.full((B, 1), 3)
    y, tail = continue_conv(new, kernel, three, tail, jnp.full(B, 2))
    np.testing.assert_allclose(y, new * kernel[:, -1], atol=1e-6)
    np.testing.assert_array_equal(tail[:, :-1], 0)
