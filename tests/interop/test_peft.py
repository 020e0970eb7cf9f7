"""PEFT adapters, in and out, against peft itself."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lm.core.paths import flatten
from lm.core.paths import merge as join
from lm.interop.hf import save_directory
from lm.interop.loaded import Loaded
from lm.interop.peft import load_adapter, save_adapter
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.zoo import get_family
from tests.models.test_adapters import LORAS, adapted
from tests.parity import hf

SMALL = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_positions=64, n_embd=32, n_head=4, n_layer=3, bos_token_id=1,
            eos_token_id=1,
        )
    ),
    "bert": lambda: transformers.BertForPreTraining(
        transformers.BertConfig(**SMALL, intermediate_size=48)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=3
        )
    ),
}  # fmt: skip


def base(name: str) -> tuple[torch.nn.Module, Loaded]:
    module = hf.randomize(BASES[name]())
    return module, Loaded(*hf.import_torch(get_family(name), module))


def logits(module) -> np.ndarray:
    with torch.no_grad():
        out = module(torch.from_numpy(hf.ids(61)).long())
    return (out.prediction_logits if hasattr(out, "prediction_logits") else out.logits).numpy()


def assert_same_logits(loaded: Loaded, module, tolerance: float = 1e-5) -> None:
    ours = np.asarray(loaded.logits(hf.ids(61)))
    assert np.abs(ours - logits(module)).max() <= tolerance


CASES = [
    *(("llama", kind) for kind in LORAS),
    ("gpt2", "lora"),
    ("gpt2", "dora"),
    ("bert", "lora"),
    ("mamba", "rslora"),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_peft_reads_what_we_write(name, kind, tmp_path):
    """peft's logits are ours; and so are those of what we read back."""
    module, loaded = base(name)
    lora = LORAS[kind]
    if name == "mamba":
        # peft refuses out_proj, whose kernel it would read past the adapter.
        lora = LoRA(4, targets=("*/up/*", "*/select/*"), rank_stabilized=True)
    changed = copy.copy(loaded)
    changed.params = adapted(loaded.model, loaded.params, lora)
    save_adapter(changed, tmp_path / "adapter", base="a-base")
    theirs = peft.PeftModel.from_pretrained(module, str(tmp_path / "adapter")).eval()
    assert np.abs(logits(theirs) - np.asarray(loaded.logits(hf.ids(61)))).max() > 1e-2
    assert_same_logits(changed, theirs)
    back = load_adapter(loaded, tmp_path / "adapter")
    assert_same_logits(back, theirs)
    if name == "llama":
        for path, leaf in flatten(changed.params).items():
            np.testing.assert_allclose(flatten(back.params)[path], leaf, rtol=1e-6, err_msg=path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"adapter"}


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
}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_beside_a_quantized_base(kind, tmp_path):
    """What is written beside codes is read beside codes, and peft's logits are ours."""
    _, loaded = base("llama")
    low = quantized.quantize(loaded.model, loaded.params, "nf4")
    plain = Loaded(loaded.model, quantized.dequantize(loaded.model, low), None)
    changed = Loaded(loaded.model, adapted(loaded.model, low, LORAS[kind]), None)
    save_adapter(changed, save_directory(plain, tmp_path / "base").parent / "adapter")
    back = load_adapter(Loaded(loaded.model, low, None), tmp_path / "adapter")
    assert flatten(back.params).keys() == flatten(changed.params).keys()
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    there = peft.PeftModel.from_pretrained(there, tmp_path / "adapter").eval()
    for ours in (changed, back):
        assert_same_logits(ours, there)


@pytest.mark.parametrize("case", CONFIGS)
def test_we_read_what_peft_writes(case, tmp_path):
    """Logits, the merged model, and the tensors written again, bit for bit."""
    name, config = CONFIGS[case]
    module, loaded = base(name)
    theirs = with_peft(module, tmp_path / "theirs", **config)
    ours = load_adapter(loaded, tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    written, original = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    )
    assert written.keys() == original.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)
    merged = copy.copy(ours)
    merged.params = adapters.merge(ours.params)
    assert_same_logits(merged, theirs.merge_and_unload())


@pytest.mark.parametrize("case", ["llama, patterns", "llama, dora", "gpt2"])
def test_gradients_equal_pefts(case, tmp_path):
    """Of A, B and the lengths of columns, by the names that the adapter is written with."""
    name, config = CONFIGS[case]
    module, loaded = base(name)
    theirs = with_peft(module, tmp_path / "theirs", **config)
    ours = load_adapter(loaded, tmp_path / "theirs")
    tokens = hf.ids(61)
    long = torch.from_numpy(tokens).long()
    theirs(input_ids=long, labels=long).loss.backward()
    frozen, adapter = adapters.split(ours.params)

    @jax.jit
    @jax.grad
    def gradient(adapter):
        logits, _ = ours.model.apply({"params": join(frozen, adapter)}, jnp.asarray(tokens))
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    grads = {path: np.asarray(leaf) for path, leaf in flatten(gradient(adapter)).items()}
    layer = 1
    seen = 0
    for key, parameter in theirs.named_parameters():
        if f".{layer}." not in key or parameter.grad is None:
            continue
        paths, _ = OURS[name][next(k for k in OURS[name] if f".{k}." in key)]
        letter = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}[
            next(n for n in ("lora_A", "lora_B", "lora_magnitude_vector") if n in key)
        ]
        found = [grads[f"{AT}{path}/lora_{letter}"][layer] for path in paths]
        expected = parameter.grad.numpy()
        if letter == "a":
            # Several kernels of one module share its A: their gradients add up.
            total = sum(leaf.reshape(-1, leaf.shape[-1]).T for leaf in found)[: len(expected)]
        elif letter == "b":
            rank = expected.shape[1]
            total = np.concatenate([leaf.reshape(len(leaf), -1)[:rank].T for leaf in found])
        else:
            total = np.concatenate([leaf.reshape(-1) for leaf in found])
        np.testing.assert_allclose(total, expected, atol=1e-5, err_msg=key)
        seen += 1
    assert seen == sum(path[-1] in "abm" for path in flatten(adapter)) - 2 * 2 * (name == "gpt2")


AT = "stack/pattern/blocks_0/"
OURS = {
    "llama": {
        "q_proj": (["mixer/layer/q"], 1),
        "v_proj": (["mixer/layer/v"], 1),
        "o_proj": (["mixer/layer/out"], 2),
        "gate_proj": (["mlp/layer/gate"], 1),
    },
    "gpt2": {
        "c_attn": ([f"mixer/layer/{p}" for p in "qkv"], 1),
        "mlp.c_proj": (["mlp/layer/down"], 1),
    },
}


def edited(directory, tensors=None, **config):
    """Changes an adapter that lies there."""
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(values | config))
    if tensors is not None:
        file = directory / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)


def without(tensors, part):
    return {key: array for key, array in tensors.items() if part not in key}


EDITS = {
    "of another kind": (dict(peft_type="LOHA"), "peft_type of .* is 'LOHA'"),
    "trained biases": (dict(bias="all"), "bias of .* is 'all'"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "modules_to_save = .* not implemented"),
    "changed base": (dict(init_lora_weights="pissa"), "init_lora_weights of .* is 'pissa'"),
    "unknown key": (dict(use_new=True), "use_new = True, which is not implemented"),
    "another rank": (dict(r=5), r"lora_A.weight has shape \(4, 32\), and rank 5 .* \(5, 32\)"),
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
    return base("llama")[1]


def saved(llama, directory):
    changed = copy.copy(llama)
    changed.params = adapted(llama.model, llama.params, LoRA(4))
    save_adapter(changed, directory)
    return changed


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
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(llama, tmp_path / "a")

    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr("lm.interop.peft.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(changed, tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_other_bases_are_refused(llama, tmp_path):
    """An adapter of GPT-2 on a Llama, and one of a wider Llama."""
    saved(llama, tmp_path / "a")
    _, gpt2 = base("gpt2")
    with pytest.raises(ValueError, match="tensors that nothing in this base maps"):
        load_adapter(gpt2, tmp_path / "a")
    model = get_family("llama").build(**get_family("llama").tiny | {"num_features": 64})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), P.abstract(model))
    with pytest.raises(ValueError, match=r"has shape \(4, 32\), and rank 4 on this base"):
        load_adapter(Loaded(model, params), tmp_path / "a")
