"""Adapters as leaves: put beside kernels, merged, stacked, taken away; without a model changing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten, map_with_path
from lm.core.paths import merge as join
from lm.models import adapters
from lm.models import params as P
from lm.models.adapters import LoRA, Rank
from lm.models.families.llama import llama
from lm.models.families.teeny_gpt import teeny_gpt
from lm.models.zoo import all_families
from tests.conformance.harness import KINDS, forward, random_tokens, tiny, with_source

EVERY = ("*/kernel",)
LORAS = {
    "lora": LoRA(rank=4, targets=EVERY),
    "rslora": LoRA(rank=4, alpha=4, targets=EVERY, rank_stabilized=True),
    "dora": LoRA(rank=4, targets=EVERY, dora=True),
    "ranks": LoRA(4, targets=EVERY, ranks=(Rank("*/q/*", 2, (0,)), Rank("*/v/*", 0, (1,)))),
}

T5_ROUNDS = pytest.mark.xfail(
    jax.__version_info__ >= (0, 11),
    reason="1.16e-5 with jax 0.11.2, of logits up to 3.3; 8.0e-6 with 0.10.1",
)


def randomized(params, seed: int = 0):
    """Moves the leaves of the adapter away from what they start as; zeros of padding stay."""
    key, flat = jax.random.key(seed), flatten(params)

    def perturb(path, leaf):
        parent, _, name = path.rpartition("/")
        if name not in ("lora_b", "lora_m"):
            return leaf
        noise = jax.random.normal(jax.random.fold_in(key, len(path) + ord(path[-10])), leaf.shape)
        if name == "lora_m":
            return leaf + 0.1 * noise
        lead, a = flat[f"{parent}/lora_scale"].ndim, flat[f"{parent}/lora_a"]
        used = a.any(axis=tuple(range(lead, a.ndim - 1)))
        return 0.2 * noise * used.reshape(*used.shape, *[1] * (leaf.ndim - used.ndim))

    return map_with_path(perturb, params)


def adapted(model, params, lora, seed: int = 0):
    return randomized(adapters.add(model, params, lora, jax.random.key(seed)), seed)


def logits(model, params, rows: int = 2, **context):
    tokens = random_tokens(model, (rows, 12))
    ctx = with_source(model, Context(**context), tokens)
    return np.asarray(forward(model, params, tokens, ctx)[0])


@pytest.mark.ledger("B45")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=T5_ROUNDS if n == "t5" else [] if n in KINDS else [pytest.mark.slow])
        for n in all_families()
    ],
)
def test_every_family_without_a_change(name):
    """At first bit for bit the base; then equal to its merged form, for every projection."""
    model, params = tiny(name)
    kernels = adapters.kernels(model)
    assert {path for path, leaf in flatten(params).items() if path.endswith("/kernel")} - {
        "head/kernel"
    } == set(kernels)
    fresh = adapters.add(model, params, LORAS["lora"], jax.random.key(0))
    np.testing.assert_array_equal(logits(model, fresh), logits(model, params))
    changed = randomized(fresh)
    ours, merged = logits(model, changed), logits(model, adapters.merge(changed))
    assert np.abs(ours - logits(model, params)).max() > 1e-2
    assert np.abs(ours - merged).max() <= 1e-5


@pytest.mark.ledger("B45")
@pytest.mark.parametrize("kind", LORAS)
def test_equals_its_merged_kernel(kind):
    model, params = tiny("llama")
    changed = adapted(model, params, LORAS[kind])
    merged = adapters.merge(changed)
    assert np.abs(logits(model, changed) - logits(model, merged)).max() <= 1e-5
    assert flatten(merged).keys() == flatten(params).keys()
    if kind != "dora":
        back = adapters.unmerge(merged, adapters.split(changed)[1])
        for path, leaf in flatten(changed).items():
            np.testing.assert_allclose(flatten(back)[path], leaf, atol=1e-5, err_msg=path)


def test_a_dora_is_not_unmerged():
    model, params = tiny("llama")
    changed = adapted(model, params, LORAS["dora"])
    with pytest.raises(ValueError, match="keep the parameters from before"):
        adapters.unmerge(adapters.merge(changed), adapters.split(changed)[1])


@pytest.mark.ledger("B45")
def test_merged_update_is_of_low_rank():
    """By singular values: rank(W' - W) is at most R, and the repeat's own where it is lower."""
    model, params = tiny("llama")
    changed = adapted(model, params, LORAS["ranks"])
    before, after = flatten(params), flatten(adapters.merge(changed))
    for path, sides in adapters.kernels(model).items():
        delta = np.asarray(after[path] - before[path], np.float64)
        for repeat in range(len(delta)):
            rows = int(np.prod(delta.shape[1 : 1 + sides.inputs]))
            values = np.linalg.svd(delta[repeat].reshape(rows, -1), compute_uv=False)
            expected = LORAS["ranks"].rank_of(path, repeat)
            assert (values > 1e-5).sum() == expected, (path, repeat)


@pytest.mark.ledger("B45")
def test_scales_and_zeros_of_lower_ranks():
    model, params = tiny("llama")
    lora = replace(LORAS["ranks"], alpha=6.0)
    flat = flatten(adapters.add(model, params, lora, jax.random.key(0)))
    at = "stack/pattern/blocks_0/mixer/layer/"
    np.testing.assert_allclose(flat[f"{at}q/lora_scale"], [3.0, 1.5, 1.5])
    np.testing.assert_allclose(flat[f"{at}v/lora_scale"], [1.5, 0.0, 1.5])
    assert flat[f"{at}q/lora_a"].shape == (3, 32, 4)
    assert flat[f"{at}out/lora_a"].shape == (3, 4, 8, 4)
    assert not flat[f"{at}q/lora_a"][0, :, 2:].any() and flat[f"{at}q/lora_a"][0, :, :2].all()
    stable = adapters.add(model, params, LORAS["rslora"], jax.random.key(0))
    np.testing.assert_allclose(flatten(stable)[f"{at}q/lora_scale"], 2.0)


def test_a_starts_uniform():
    """Between plus and minus 1 / sqrt(inputs), all inputs of a kernel counted."""
    model = llama(61, num_features=64, num_heads=4, num_layers=2, mlp_features=48)
    params = P.init(model, jax.random.key(0))
    flat = flatten(adapters.add(model, params, LoRA(16, targets=EVERY), jax.random.key(1)))
    for path, sides in adapters.kernels(model).items():
        a = flat[path.replace("kernel", "lora_a")]
        bound = np.prod(a.shape[1 : 1 + sides.inputs]) ** -0.5
        assert np.abs(a).max() <= bound and abs(float(a.std()) - bound / 3**0.5) <= 0.05 * bound


def test_count_on_teeny_gpt():
    """Rank 8 on q, k, v and out is 8,192 of 1,089,181 parameters, 0.752%."""
    targets = tuple(f"*/{name}/kernel" for name in ("q", "k", "v", "out"))
    model = teeny_gpt()
    _, adapter = adapters.split(adapters.abstract(model, LoRA(8, targets=targets)))
    trained = {path: leaf for path, leaf in flatten(adapter).items() if path[-1] in "ab"}
    assert (P.count(trained), P.count(model)) == (8192, 1089181)


def three_adapters(model, params):
    kinds = [LoRA(2), LoRA(4, targets=EVERY, dora=True), LoRA(3, targets=("*/q/kernel", "*/up/*"))]
    alone = [adapted(model, params, lora, seed) for seed, lora in enumerate(kinds)]
    return alone, adapters.stack(params, [adapters.split(each)[1] for each in alone])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.15)])
def test_each_row_has_its_adapter(dtype, tolerance):
    """Of other ranks, targets and kinds; -1 is the base."""
    model, params = tiny("llama")
    alone, several = three_adapters(model, params)
    ids = jnp.array([1, -1, 0, 2, 1], jnp.int32)
    ours = logits(model, several, 5, adapter_B=ids, dtype=dtype)
    for row, index in enumerate(ids):
        one = params if index < 0 else alone[index]
        expected = logits(model, one, 5, dtype=dtype)[row]
        error = np.abs(ours[row].astype(np.float32) - expected.astype(np.float32)).max()
        assert error <= tolerance, (row, error)
    for index, one in enumerate(alone):
        chosen = adapters.select(several, index)
        assert np.abs(logits(model, chosen) - logits(model, one)).max() <= 1e-5
    base = logits(model, several, 5, adapter_B=jnp.full(5, -1))
    np.testing.assert_array_equal(base, logits(model, params, 5))


@pytest.mark.parametrize("name", ["t5", pytest.param("bert", marks=pytest.mark.slow), "mamba"])
def test_rows_of_other_families(name):
    model, params = tiny(name)
    one = adapted(model, params, LoRA(3, targets=EVERY))
    ours = logits(model, one, adapter_B=jnp.array([0, -1]))
    assert np.abs(ours[0] - logits(model, one)[0]).max() <= 1e-5
    np.testing.assert_allclose(ours[1], logits(model, params)[1], atol=1e-6)


def test_a_row_of_no_adapter_is_not_a_number():
    model, params = tiny("llama")
    _, several = three_adapters(model, params)
    ours = logits(model, several, adapter_B=jnp.array([0, 3]))
    assert np.isfinite(ours[0]).all() and np.isnan(ours[1]).all()


def test_dropout_reaches_the_adapter_alone():
    """It changes nothing where A B is zero, is off where deterministic, and keeps the mean."""
    model, params = tiny("llama")
    fresh = adapters.add(model, params, LORAS["lora"], jax.random.key(0))
    changed = randomized(fresh)
    tokens = random_tokens(model)
    draw = jax.jit(
        lambda params, key, ctx: model.apply({"params": params}, tokens, ctx, rngs={"dropout": key})
    )
    ctx = Context(adapter_dropout=0.3, deterministic=False)
    keys = jax.random.split(jax.random.key(1), 2)
    np.testing.assert_array_equal(draw(fresh, keys[0], ctx)[0], logits(model, params))
    first, second = (np.asarray(draw(changed, key, ctx)[0]) for key in keys)
    assert np.abs(first - second).max() > 1e-3
    off = draw(changed, keys[0], ctx.replace(deterministic=True))[0]
    np.testing.assert_array_equal(off, logits(model, changed))


@pytest.mark.parametrize(
    "unroll, remat", [(1, "none"), pytest.param(1, "full", marks=pytest.mark.slow), (3, "dots")]
)
def test_scanned_equals_unrolled(unroll, remat):
    model, params = tiny("llama")
    changed = adapted(model, params, LORAS["dora"])
    ours = logits(model, changed, unroll=unroll, remat=remat)
    assert np.abs(ours - logits(model, changed)).max() <= 1e-5


def test_split_and_remove():
    model, params = tiny("gpt2")
    changed = adapted(model, params, LORAS["dora"])
    base, adapter = adapters.split(changed)
    assert all(map(adapters.is_adapter, flatten(adapter)))
    assert flatten(adapters.remove(changed)).keys() == flatten(params).keys()
    assert flatten(join(base, adapter)).keys() == flatten(changed).keys()


def test_mistakes_are_named():
    model, params = tiny("llama")
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"no kernel fits the target '\*/w1/\*'.*mlp/layer/gate/k"):
        adapters.add(model, params, LoRA(targets=("*/q/kernel", "*/w1/*")), key)
    with pytest.raises(ValueError, match=r"exception '.*gate.*' to the rank fits no target"):
        adapters.add(model, params, LoRA(ranks=(Rank("*/gate/*", 2),)), key)
    with pytest.raises(ValueError, match="every rank of the adapter is 0"):
        adapters.add(model, params, LoRA(ranks=(Rank("*", 0),)), key)
    changed = adapters.add(model, params, LoRA(), key)
    with pytest.raises(ValueError, match="hold an adapter already"):
        adapters.add(model, changed, LoRA(), key)
    with pytest.raises(ValueError, match="hold no adapter"):
        adapters.merge(params)
    several = three_adapters(model, params)[1]
    with pytest.raises(ValueError, match="hold several adapters: select one"):
        adapters.merge(several)
    with pytest.raises(ValueError, match="no adapter 3"):
        adapters.select(several, 3)
    with pytest.raises(ValueError, match="hold 3 adapters: say in adapter_B"):
        logits(model, several)
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(ValueError):
            LoRA(**wrong)
    other = adapters.split(changed)[1]
    with pytest.raises(ValueError, match="which this base does not have"):
        adapters.stack(tiny("t5")[1], [other])
