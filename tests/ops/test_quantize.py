"""Quantizers against brute force, against qwix, and against bitsandbytes where it is installed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from lm.ops import quantize as Q

LEVELS = {
    "int8": np.arange(-128, 128),
    "int4": np.arange(-8, 8),
    "nf4": np.array(Q.NF4, np.float32),
}
# A matrix, and stacked kernels with several input dimensions.
SHAPES = [((96, 5), (0,)), ((3, 2, 12, 5), (1, 2))]
quantize = jax.jit(Q.quantize, static_argnums=(1, 2, 3))
dequantize = jax.jit(Q.dequantize, static_argnums=(2, 3))


def random_kernel(shape, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape) * 0.02


def brute_force(codes, scales, kind, inputs):
    """One weight at a time: its code, its level, the scale of its group."""
    codes, scales = np.asarray(codes), np.asarray(scales)
    shape = list(codes.shape)
    axis = inputs[-1]
    shape[axis] *= 1 if kind == "int8" else 2
    kernel = np.zeros(shape, np.float32)
    for place in itertools.product(*map(range, shape)):
        at = list(place)
        if kind == "int8":
            level = int(codes[place])
            for dim in inputs:
                at[dim] = 0
        else:
            at[axis] //= 2
            byte = int(codes[tuple(at)])
            level = LEVELS[kind][byte % 16 if place[axis] % 2 == 0 else byte // 16]
            at[axis] = place[axis] * scales.shape[axis] // shape[axis]
        kernel[place] = np.float32(level) * scales[tuple(at)]
    return kernel


@pytest.mark.parametrize("kind", Q.KINDS)
@pytest.mark.parametrize("shape, inputs", SHAPES)
def test_dequantized_by_brute_force(kind, shape, inputs):
    kernel = random_kernel(shape)
    codes, scales = quantize(kernel, kind, inputs)
    ours = dequantize(codes, scales, kind, inputs[-1])
    np.testing.assert_array_equal(ours, brute_force(codes, scales, kind, inputs))
    bits = {"int8": 8}.get(kind, 4)
    assert codes.nbytes == kernel.size * bits // 8
    # Each weight stands at the nearest of its levels.
    axis, wide = inputs[-1], np.asarray(scales)
    if kind != "int8":
        wide = np.repeat(wide, shape[axis] // wide.shape[axis], axis)
    every = wide[..., None] * LEVELS[kind]
    nearest = np.abs(every - np.asarray(kernel)[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(ours - kernel), nearest, atol=1e-8)


@pytest.mark.parametrize("kind", Q.KINDS)
@pytest.mark.parametrize("shape, inputs", SHAPES)
def test_equals_qwix(kind, shape, inputs):
    qwix = pytest.importorskip("qwix")
    kernel = random_kernel(shape, 1)
    outputs = [dim for dim in range(len(shape)) if dim not in inputs]
    if kind == "int8":
        options = dict(channelwise_axes=outputs)
    else:
        axis = inputs[-1]
        apart = [dim for dim in range(len(shape)) if dim != axis]
        options = dict(channelwise_axes=apart, tiled_axes={axis: Q.group_size(shape[axis])})
    qtype = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}[kind]
    theirs = qwix.quantize(kernel, qtype, **options)
    codes, scales = quantize(kernel, kind, inputs)
    np.testing.assert_allclose(scales, theirs.scale, rtol=1e-6)
    ours = np.asarray(dequantize(codes, scales, kind, inputs[-1]))
    there = np.asarray(qwix.dequantize(theirs))
    # The largest weight of a group lies halfway between two integers, and rounds to either.
    halfway = np.abs(ours - there) > 1e-7
    np.testing.assert_allclose(np.abs(ours - kernel), np.abs(there - kernel), atol=1e-7)
    assert not halfway.any() if kind == "nf4" else halfway.sum() <= scales.size


def test_equals_bitsandbytes():
    """Blocks of 64 along the input of a torch weight are our groups, codes and all."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    kernel = random_kernel((192, 24), 2)
    weight = torch.tensor(np.asarray(kernel).T.copy())
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = quantize(kernel, "nf4", (0,))
    np.testing.assert_array_equal(np.asarray(scales).T.reshape(-1), state.absmax.numpy())
    ours = dequantize(codes, scales, "nf4", 0)
    there = functional.dequantize_4bit(theirs, state).numpy()
    np.testing.assert_allclose(np.asarray(ours).T, there, atol=1e-8)
    np.testing.assert_array_equal(np.float32(Q.NF4), state.code.numpy())


def test_levels_of_nf4_are_quantiles_of_a_normal():
    """Dettmers et al. (2023), section 3: 8 quantiles above zero, 7 below, and zero itself."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(Q.NF4, levels / levels.max(), atol=1e-6)


def test_error_on_normal_weights():
    """In groups of 64, 16 quantiles lose less than 16 integers, and 256 integers far less.

    The variance being 1, a quarter of a million weights gave 0.0085, 0.0106 and 0.000075.
    """
    kernel = random_kernel((1024, 64)) / 0.02
    errors = {}
    for kind in Q.KINDS:
        codes, scales = quantize(kernel, kind, (0,))
        errors[kind] = float(jnp.mean((dequantize(codes, scales, kind, 0) - kernel) ** 2))
    assert errors["int8"] < 1e-4 and 0.007 < errors["nf4"] < 0.009 < errors["int4"] < 0.012


@pytest.mark.parametrize("kind", Q.KINDS)
def test_no_weight_is_off_by_more_than_half_a_step(kind):
    kernel = random_kernel((128, 16), 3)
    codes, scales = quantize(kernel, kind, (0,))
    error = np.abs(dequantize(codes, scales, kind, 0) - kernel)
    half = 0.5 if kind != "nf4" else np.diff(Q.NF4).max() / 2
    wide = np.broadcast_to(scales, kernel.shape) if kind == "int8" else np.repeat(scales, 64, 0)
    assert (error <= half * wide * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", Q.KINDS)
def test_zeros_stay_zeros(kind):
    kernel = random_kernel((64, 3)).at[:, 1].set(0.0)
    codes, scales = quantize(kernel, kind, (0,))
    back = np.asarray(dequantize(codes, scales, kind, 0))
    assert not back[:, 1].any() and np.isfinite(back).all()


def test_groups():
    assert [Q.group_size(n) for n in (2, 48, 64, 96, 576, 4096)] == [2, 48, 64, 48, 64, 64]
    assert Q.quantize(jnp.ones((64, 3)), "nf4", (0,), 16)[1].shape == (4, 3)


def test_refusals():
    with pytest.raises(ValueError, match="one of int8, int4, nf4, not 'int3'"):
        Q.quantize(jnp.ones((4, 4)), "int3", (0,))
    with pytest.raises(ValueError, match="even number of inputs, two to a byte, not 5"):
        Q.quantize(jnp.ones((5, 4)), "nf4", (0,))
    assert Q.quantize(jnp.ones((5, 4)), "int8", (0,))[0].shape == (5, 4)
