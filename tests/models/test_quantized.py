"""Quantized kernels as leaves: put in place of kernels, used, merged; without a model changing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten
from lm.models import adapters, quantized
from lm.models.families.llama import llama
from lm.models.kernels import kernels
from lm.models.zoo import all_families
from lm.ops.quantize import KINDS
from tests.conformance.harness import forward, random_tokens, tiny
from tests.models.test_adapters import LORAS, adapted, logits, randomized

quantize = jax.jit(quantized.quantize, static_argnums=(0, 2, 3))
dequantize = jax.jit(quantized.dequantize, static_argnums=0)
FAST = {("llama", "int8"), ("llama", "nf4")}


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(*each, marks=[] if each in FAST else pytest.mark.slow)
        for each in itertools.product(all_families(), KINDS)
    ],
)
def test_equals_its_dequantized_kernels(name, kind):
    model, params = tiny(name)
    low = quantize(model, params, kind)
    plain = dequantize(model, low)
    assert np.abs(logits(model, low) - logits(model, plain)).max() <= 1e-5
    assert flatten(plain).keys() == flatten(params).keys()
    for path, leaf in flatten(plain).items():
        if path in kernels(model):
            change = np.abs(leaf - flatten(params)[path])
            assert leaf.shape == flatten(params)[path].shape
            assert 0 < change.max() < (0.02 if kind == "int8" else 0.5) * np.abs(leaf).max(), path
        else:
            np.testing.assert_array_equal(leaf, flatten(params)[path])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_axes(kind):
    """A weight takes 8 or 4 bits, and its share of a scale; each leaf has an axis a dimension."""
    model = llama(256, num_features=128, num_heads=2, num_layers=3, mlp_features=192)
    shapes = jax.eval_shape(lambda: adapters.P.init(model, jax.random.key(0)))
    low = flatten(quantized.abstract(model, shapes, kind))
    axes = quantized.logical_axes(model)
    for path, leaf in low.items():
        assert len(axes[path]) == len(leaf.shape), path
    for path, sides in kernels(model).items():
        codes, scales = low[f"{path}_{kind}"], low[f"{path}_scales"]
        size = flatten(shapes)[path].size
        per = size if kind == "int8" else size // 2
        assert codes.size * codes.dtype.itemsize == per
        if kind == "int8":
            outputs = flatten(shapes)[path].shape[sides.lead + sides.inputs :]
            assert scales.size == 3 * int(np.prod(outputs))
        else:
            assert scales.size == size // 64


def test_rounded_once():
    """In bfloat16, the kernels are those of the dequantized base, bit for bit."""
    model, params = tiny("llama")
    low = quantize(model, params, "nf4")
    ours = logits(model, low, dtype="bfloat16")
    np.testing.assert_array_equal(ours, logits(model, dequantize(model, low), dtype="bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", LORAS)
def test_an_adapter_beside_quantized_kernels(lora):
    """It starts from the quantized base exactly, and equals its merged form."""
    model, params = tiny("llama")
    low = quantize(model, params, "nf4")
    fresh = adapters.add(model, low, LORAS[lora], jax.random.key(0))
    assert np.abs(logits(model, fresh) - logits(model, low)).max() <= 1e-5
    changed = randomized(fresh)
    merged = adapters.merge(changed)
    ours = logits(model, changed)
    assert np.abs(ours - logits(model, low)).max() > 1e-2
    assert np.abs(ours - logits(model, merged)).max() <= 1e-5
    # As if the base had been dequantized first.
    plain = adapted(model, dequantize(model, low), LORAS[lora])
    for path, leaf in flatten(adapters.merge(plain)).items():
        np.testing.assert_allclose(flatten(merged)[path], leaf, atol=1e-6, err_msg=path)
    if lora == "lora":
        back = adapters.unmerge(merged, adapters.split(changed)[1])
        for path, leaf in flatten(plain).items():
            np.testing.assert_allclose(flatten(back)[path], leaf, atol=1e-5, err_msg=path)


def test_merging_leaves_other_kernels_quantized():
    model, params = tiny("llama")
    low = quantize(model, params, "int4")
    some = adapters.LoRA(2, targets=("*/q/kernel",))
    merged = flatten(adapters.merge(adapted(model, low, some)))
    for path in kernels(model):
        assert (path in merged) == path.endswith("/q/kernel")
        assert (f"{path}_int4" in merged) == (not path.endswith("/q/kernel"))


@pytest.mark.slow
def test_several_adapters_beside_one_quantized_base():
    model, params = tiny("llama")
    low = quantize(model, params, "nf4")
    each = [adapted(model, low, LORAS[kind], seed) for seed, kind in enumerate(("lora", "dora"))]
    both = adapters.stack(low, [adapters.split(params)[1] for params in each])
    ours = logits(model, both, adapter_B=jnp.array([1, 0]))
    for row, number in ((0, 1), (1, 0)):
        alone = logits(model, each[number])
        np.testing.assert_allclose(ours[row], alone[row], atol=1e-5)
        chosen = logits(model, adapters.select(both, number))
        np.testing.assert_allclose(chosen, alone, atol=1e-5)


def test_some_kernels_alone():
    model, params = tiny("llama")
    low = flatten(quantize(model, params, "int8", ("*/mlp/*",)))
    for path in kernels(model):
        assert (f"{path}_int8" in low) == ("/mlp/" in path)
    tokens = random_tokens(model)
    out, _ = forward(model, quantize(model, params, "int8", ("*/mlp/*",)), tokens, Context())
    assert np.isfinite(out).all()


def test_refusals():
    model, params = tiny("llama")
    with pytest.raises(ValueError, match="one of int8, int4, nf4, not 'int5'"):
        quantized.quantize(model, params, "int5")
    with pytest.raises(ValueError, match=r"no kernel fits the target 'embed/\*'"):
        quantized.quantize(model, params, "nf4", ("embed/*",))
    with pytest.raises(ValueError, match=r"/kernel is quantized already"):
        quantized.quantize(model, quantize(model, params, "int8"), "nf4")
    odd = llama(61, num_features=64, num_heads=4, num_layers=1, mlp_features=45)
    with pytest.raises(ValueError, match=r"down/kernel: .* even number of inputs.*not 45"):
        quantized.abstract(odd, adapters.P.abstract(odd), "nf4")
