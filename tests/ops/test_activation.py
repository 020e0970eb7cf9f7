"""Activations and their gradients equal torch's, and keep no more than their arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.ops.activation import FUNCTIONS, activate

torch = pytest.importorskip("torch")
F = torch.nn.functional
THEIRS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def test_all_are_compared():
    assert THEIRS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_equals_torch(name, gated):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-8, 8, 401), [-40.0, 40.0]]).astype(np.float32)
    times, grad = rng.normal(size=(2, len(x))).astype(np.float32)
    arguments = (x, times) if gated else (x,)
    out, back = jax.vjp(lambda *a: activate(name, *a), *map(jnp.asarray, arguments))

    # In float64, since torch's own fp32 gradient of gelu_tanh is off by 1e-5.
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
    expected = THEIRS[name](theirs[0]) * (theirs[1] if gated else 1)
    expected.backward(torch.tensor(grad, dtype=torch.float64))
    np.testing.assert_allclose(out, expected.detach(), atol=2e-6, rtol=1e-6)
    for ours, tensor in zip(back(jnp.asarray(grad)), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_low_precision_is_rounded_once(name, gated):
    x_64 = jnp.linspace(-6, 6, 64).astype(jnp.bfloat16)
    arguments = (x_64, jnp.full_like(x_64, 1.5)) if gated else (x_64,)
    wide = [a.astype(jnp.float32) for a in arguments]
    out, back = jax.vjp(lambda *a: activate(name, *a), *arguments)
    expected, wide_back = jax.vjp(lambda *a: activate(name, *a), *wide)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, expected.astype(jnp.bfloat16))
    for ours, theirs in zip(back(out), wide_back(out.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))


@pytest.mark.perf
@pytest.mark.parametrize("name", THEIRS)
def test_nothing_but_arguments_and_results_lives_until_the_backward_pass(name):
    """Of 16 layers in one program x, times and the result, which is the next product's operand.

    What is computed again is in another form, since XLA would keep an equal one.
    """
    rows, width, layers = 256, 512, 16
    kernels = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
    x_BF = jax.ShapeDtypeStruct((rows, width), jnp.float32)

    def loss(kernels, x_BF):
        for kernel_FF in kernels:
            x_BF = activate(name, x_BF @ kernel_FF, x_BF @ kernel_FF.T)
        return x_BF.sum()

    compiled = jax.jit(jax.grad(loss)).lower(kernels, x_BF).compile()
    array = 4 * rows * width
    assert compiled.memory_analysis().temp_size_in_bytes < (3 * layers + 12) * array
