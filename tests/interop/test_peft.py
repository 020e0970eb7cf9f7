"""PEFT adapters, in and out, against peft itself."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lm.core.context import Context
from lm.core.paths import flatten
from lm.core.paths import merge as join
from lm.interop.hf import save_directory
from lm.interop.loaded import Loaded
from lm.interop.peft import TENSORS, load_adapter, modules_of, save_adapter
from lm.interop.peft_config import CONFIG
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.adapters import LoRA, Rank
from lm.models.encdec import EncoderDecoder
from lm.models.zoo import family_of, get_family
from lm.ops.rotary import Rotary
from tests.conformance.harness import tiny
from tests.models.test_adapters import EVERY, LORAS, adapted
from tests.parity import hf

# peft reads the kernels of out_proj and dt_proj past the adapter.
MAMBA = LoRA(4, alpha=4, targets=("*/up/*", "*/select/*"), rank_stabilized=True)
RANK_0 = LoRA(4, targets=EVERY, dora=True, ranks=(Rank("*/v/*", 0, (1,)),))
TOKENS = hf.ids(61)
TARGETS = hf.ids(61, (2, 9), seed=1)


def model_of(name: str):
    """Returns the tiny model of a family, every parameter random."""
    if name != "mistral":
        return tiny(name)
    return get_family("llama").build(**{**get_family("llama").tiny, "window": 8}), tiny("llama")[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function: family -> the Hugging Face class on the directory that we export, and ours."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str):
        loaded, path = Loaded(*model_of(name)), folder / name
        if not path.exists():
            save_directory(loaded, path)
        (kind,) = json.loads((path / "config.json").read_text())["architectures"]
        return getattr(transformers, kind).from_pretrained(path).eval(), loaded

    return make


def options_of(loaded: Loaded) -> dict:
    return {"targets": TARGETS} if isinstance(loaded.model, EncoderDecoder) else {}


def our_logits(loaded: Loaded) -> np.ndarray:
    return np.asarray(loaded.logits(TOKENS, **options_of(loaded)))


def logits_of(module) -> torch.Tensor:
    inputs = {"input_ids": torch.from_numpy(TOKENS).long()}
    if module.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.from_numpy(TARGETS).long()
    out = module(**inputs)
    return out.prediction_logits if hasattr(out, "prediction_logits") else out.logits


def assert_same_logits(ours: np.ndarray, module) -> None:
    with torch.no_grad():
        assert np.abs(ours - logits_of(module).numpy()).max() <= 1e-5


CASES = [
    *(("llama", LORAS[kind]) for kind in LORAS),
    ("llama", RANK_0),
    ("gpt2", LORAS["lora"]),
    pytest.param("mamba", MAMBA, marks=pytest.mark.slow),
    pytest.param("mistral", LORAS["lora"], marks=pytest.mark.slow),
    pytest.param("gpt2", LORAS["dora"], marks=pytest.mark.slow),
    pytest.param("bert", LORAS["ranks"], marks=pytest.mark.slow),
    pytest.param("t5", LORAS["lora"], marks=pytest.mark.slow),
    pytest.param("vanilla", LORAS["lora"], marks=pytest.mark.slow),
]


@pytest.mark.ledger("D09")
@pytest.mark.parametrize("name, lora", CASES)
def test_peft_reads_what_we_write(name, lora, base, tmp_path):
    """peft's logits are ours; and so are those of what we read back, also as peft writes it."""
    module, loaded = base(name)
    changed = replace(loaded, params=adapted(loaded.model, loaded.params, lora))
    save_adapter(changed, tmp_path / "adapter", base="a-base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG, TENSORS}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword")  # Keys that peft does not know.
        theirs = peft.PeftModel.from_pretrained(module, str(tmp_path / "adapter")).eval()
    ours = our_logits(changed)
    assert np.abs(ours - our_logits(loaded)).max() > 1e-2
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "again")
    for directory in ("adapter", "again"):
        back = load_adapter(loaded, tmp_path / directory)
        np.testing.assert_allclose(our_logits(back), ours, atol=1e-5)
        if name not in ("gpt2", "mamba") and lora is not RANK_0:  # Those are not in blocks.
            for path, leaf in flatten(changed.params).items():
                np.testing.assert_allclose(flatten(back.params)[path], leaf, 1e-6, err_msg=path)


def with_peft(module, directory, **config):
    """Returns a peft model with everything of its adapter random, and saves the adapter."""
    theirs = peft.get_peft_model(module, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(directory)
    return theirs


ATTENTION = ["q_proj", "v_proj", "o_proj", "gate_proj"]
CONFIGS = {
    "llama": ("llama", dict(r=4, lora_alpha=7, target_modules=ATTENTION)),
    "llama, patterns": (
        "llama",
        dict(
            r=4, target_modules=ATTENTION, use_rslora=True, exclude_modules=[],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "o_proj": 3},
            alpha_pattern={"v_proj": 5},
        ),
    ),
    "llama, dora": ("llama", dict(r=3, target_modules=ATTENTION, use_dora=True)),
    "llama, regex": ("llama", dict(r=3, target_modules=r".*\.[01]\..*\.(k_proj|down_proj)")),
    "gpt2": (
        "gpt2", dict(r=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    ),
    "gpt2, dora": (
        "gpt2", dict(r=3, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    ),
    "bert": ("bert", dict(r=2, target_modules=["query", "intermediate.dense"])),
    "mamba": ("mamba", dict(r=2, target_modules=["in_proj", "x_proj"])),
    "t5": ("t5", dict(r=2, lora_alpha=4, target_modules=["q", "wo"])),
    "vanilla": ("vanilla", dict(r=2, target_modules=["k_proj", "fc2"])),
}  # fmt: skip
SLOWER = ("llama", "llama, regex", "bert", "mamba", "t5", "vanilla")
SLOW = dict.fromkeys(SLOWER, pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_a_quantized_base(kind, tmp_path):
    """What is written beside codes is read beside codes, and peft's logits are ours."""
    model, params = model_of("llama")
    low = quantized.quantize(model, params, "nf4")
    plain = Loaded(model, quantized.dequantize(model, low), None)
    changed = Loaded(model, adapted(model, low, LORAS[kind]), None)
    save_adapter(changed, save_directory(plain, tmp_path / "base").parent / "adapter")
    back = load_adapter(Loaded(model, low, None), tmp_path / "adapter")
    assert flatten(back.params).keys() == flatten(changed.params).keys()
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    there = peft.PeftModel.from_pretrained(there, tmp_path / "adapter").eval()
    for ours in (changed, back):
        assert_same_logits(our_logits(ours), there)


@pytest.mark.ledger("B45")
@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW.get(c, ())) for c in CONFIGS])
def test_we_read_what_peft_writes(case, base, tmp_path):
    """Logits, gradients, the merged model, and the tensors written again, bit for bit."""
    name, config = CONFIGS[case]
    module, loaded = base(name)
    theirs = with_peft(module, tmp_path / "theirs", **config)
    ours = load_adapter(loaded, tmp_path / "theirs")
    frozen, adapter = adapters.split(ours.params)
    shape = our_logits(loaded).shape
    weights = np.random.default_rng(2).normal(size=shape).astype(np.float32) / shape[0] / shape[1]

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients(adapter):
        options = options_of(loaded)
        tokens = options.get("targets", TOKENS)
        ctx = Context(source_BS=jnp.asarray(TOKENS)) if options else Context()
        logits, _ = loaded.model.apply({"params": join(frozen, adapter)}, tokens, ctx)
        return jnp.sum(logits * weights), logits

    grads, logits = gradients(adapter)
    assert_same_logits(np.asarray(logits), theirs)
    torch.sum(logits_of(theirs) * torch.from_numpy(weights)).backward()
    assert_same_gradients(flatten(grads), theirs, ours)
    save_adapter(ours, tmp_path / "ours")
    written, original = (load_file(tmp_path / side / TENSORS) for side in ("ours", "theirs"))
    assert written.keys() == original.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)
    merged = replace(ours, params=jax.jit(adapters.merge)(ours.params))
    assert_same_logits(our_logits(merged), theirs.merge_and_unload())


def assert_same_gradients(grads, theirs, loaded: Loaded) -> None:
    """Of A, B and the lengths of columns, each relative to its largest."""
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    for module in modules_of(get_weights(loaded), loaded.model, flatten(loaded.params)):
        prefix = f"base_model.model.{module.name}."
        if f"{prefix}lora_A.weight" not in expected:
            continue
        num_in, rank = module.row.layout.num_in, len(expected[f"{prefix}lora_A.weight"])
        at = [path.removesuffix("kernel") for path in module.row.paths]
        a, b = ([np.asarray(grads[f"{p}lora_{x}"])[module.repeat] for p in at] for x in "ab")
        # Several kernels of one module share its A: their gradients add up.
        found = {"lora_A.weight": sum(g.reshape(-1, g.shape[-1]).T for g in a)[:rank]}
        found["lora_B.weight"] = np.concatenate([g.reshape(len(g), -1)[:rank].T for g in b])
        if f"{at[0]}lora_m" in grads:
            m = [np.asarray(grads[f"{p}lora_m"])[module.repeat].reshape(-1) for p in at]
            found["lora_magnitude_vector.weight"] = np.concatenate(m)
        assert all(g.ndim - 1 == num_in for g in a)
        for ending, gradient in found.items():
            theirs_here = expected.pop(prefix + ending)
            error = np.abs(gradient - theirs_here).max() / np.abs(theirs_here).max()
            assert error <= 1e-4, (module.name, ending, error)
    assert not expected, sorted(expected)


def get_weights(loaded: Loaded):
    return family_of(loaded.model).weights(loaded.model)


def edited(directory, tensors=None, **config):
    """Changes an adapter that lies there."""
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | config))
    if tensors is not None:
        file = directory / TENSORS
        save_file(tensors(load_file(file)), file)


def without(tensors, part):
    return {key: array for key, array in tensors.items() if part not in key}


EDITS = {
    "of another kind": (dict(peft_type="LOHA"), "peft_type of .* is 'LOHA'"),
    "trained biases": (dict(bias="all"), "bias of .* is 'all'"),
    "whole modules": (
        dict(modules_to_save=["lm_head"]),
        "modules_to_save .* names 'lm_head', and no",
    ),
    "changed base": (dict(init_lora_weights="pissa"), "init_lora_weights of .* is 'pissa'"),
    "unknown key": (dict(use_new=True), "use_new = True, which is not implemented"),
    "another rank": (dict(r=5), r"lora_A.weight has shape \(4, 32\), and rank 5 .* \(5, 32\)"),
    "no targets": (dict(target_modules=["w_proj"]), "no module of this base fits .*'w_proj'"),
    "more targets": (dict(target_modules=["q_proj", "k_proj"]), "targets .*k_proj, and .* has no"),
    "fewer targets": (dict(target_modules=["q_proj"]), "tensors that nothing .* maps: .*v_proj"),
    "no tensors": (dict(tensors=lambda t: without(t, "0.self_attn.q_proj.lora_B")), "has no .*B"),
    "more tensors": (
        dict(tensors=lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 32))}),
        "tensors that nothing in this base maps: base_model.model.lm_head",
    ),
}


@pytest.fixture(scope="module")
def llama():
    return Loaded(*tiny("llama"))


def saved(llama, directory, lora=LoRA(4)):
    changed = replace(llama, params=adapters.add(llama.model, llama.params, lora, KEY))
    save_adapter(changed, directory)
    return changed


KEY = jax.random.key(0)


@pytest.mark.parametrize("edit", EDITS)
def test_reading_is_closed(edit, llama, tmp_path):
    changes, message = EDITS[edit]
    saved(llama, tmp_path / "a")
    edited(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(llama, tmp_path / "a")


def test_mistakes_write_nothing(llama, tmp_path, monkeypatch):
    changed = saved(llama, tmp_path / "a")
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(changed, tmp_path / "a")
    with pytest.raises(ValueError, match="hold no adapter"):
        save_adapter(llama, tmp_path / "b")
    with pytest.raises(ValueError, match="hold an adapter, for which this format has no place"):
        save_directory(changed, tmp_path / "b")
    with pytest.raises(ValueError, match="hold an adapter already"):
        load_adapter(changed, tmp_path / "a")
    whole = (tmp_path / "a" / TENSORS).read_bytes()
    for damaged in (b"\x10" * 20, whole[:-1], whole[:100], b""):
        (tmp_path / "a" / TENSORS).write_bytes(damaged)
        with pytest.raises(ValueError, match="safetensors is damaged"):
            load_adapter(llama, tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    with pytest.raises(ValueError, match="safetensors is missing"):
        load_adapter(llama, tmp_path / "a")
    mamba = Loaded(*tiny("mamba"))
    with pytest.raises(
        ValueError, match=r"peft computes no adapter of .*\.0\.mixer\.out_proj in a"
    ):
        saved(mamba, tmp_path / "b", LoRA(2, targets=("*/out/*",)))

    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr("lm.interop.peft.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(changed, tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_other_bases_are_refused(llama, tmp_path):
    """An adapter of a Llama on GPT-2, on a wider Llama, and on one of another rotation."""
    saved(llama, tmp_path / "ours")
    # What others write says nothing of the base.
    theirs = tmp_path / "theirs"
    shutil.copytree(tmp_path / "ours", theirs)
    edited(theirs, tensors=lambda tensors: tensors)
    family = get_family("llama")

    def made(**changes):
        model = family.build(**{**family.tiny, **changes})
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), P.abstract(model))
        return Loaded(model, params)

    for path, other, message in [
        (tmp_path / "ours", Loaded(*tiny("gpt2")), "another base: model_type is 'llama' there and"),
        (tmp_path / "ours", made(num_features=64), "hidden_size is 32 there and 64 here"),
        (tmp_path / "ours", made(rotary=Rotary(600.0)), "rope_theta is 500.0 there and 600.0 here"),
        (theirs, Loaded(*tiny("gpt2")), "no module of this base fits target_modules = "),
        (theirs, made(num_features=64), r"has shape \(4, 32\), and rank 4 on this base"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter(other, path)
    # How long a text may be and what is dropped in training change no adapter.
    load_adapter(made(max_length=32), tmp_path / "ours")
    load_adapter(made(rotary=Rotary(600.0)), theirs)
