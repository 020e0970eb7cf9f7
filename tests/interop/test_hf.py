"""Directories of transformers load here with the same logits, and ours load there."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.core.paths import flatten
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.models.decoder import Decoder
from tests.conformance.harness import FAMILIES, tiny
from tests.parity.hf import ids, randomize, right_padded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "gpt2": dict(vocab_size=61, n_positions=40, n_embd=32, n_head=4, n_layer=2),
    "llama": dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("shards", ["one file", "sharded", "bfloat16"])
def test_reads_what_transformers_writes(kind, shards, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **SMALL[kind])
    module = randomize(transformers.AutoModelForCausalLM.from_config(config))
    if shards == "bfloat16":
        module = module.to(torch.bfloat16)
    module.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    loaded = hf.load_directory(tmp_path)
    # A bfloat16 module also rounds its rotary frequencies, so it is read anew in fp32.
    module = type(module).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens, mask = ids(61), right_padded()
    with torch.no_grad():
        theirs = module(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
        ).logits
    ours = loaded.logits(tokens, mask=mask)
    assert np.abs((np.asarray(ours) - theirs.numpy())[mask == 1]).max() <= 1e-4


MODELS = {name: family.build(**family.tiny) for name, family in FAMILIES.items()}
DECODERS = [
    name
    for name, model in MODELS.items()
    if isinstance(model, Decoder) and model.causal and FAMILIES[name].classes
]


@pytest.mark.ledger("D09")
@pytest.mark.parametrize(
    "name, shard_bytes",
    [*((name, 10**9) for name in [*DECODERS, "mistral"]), ("gpt2", 20_000), ("llama", 20_000)],
)
def test_transformers_reads_what_we_write(name, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    model, params = tiny("llama" if name == "mistral" else name)
    if name == "mistral":
        model = FAMILIES["llama"].build(**FAMILIES["llama"].tiny, window=5)
    loaded = Loaded(model, params)
    path = hf.save_directory(loaded, tmp_path / "out")
    module, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (path / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    tokens, mask = ids(model.vocab_size), right_padded()
    with torch.no_grad():
        theirs = module.eval()(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
        ).logits
    ours = loaded.logits(tokens, mask=mask)
    assert np.abs((np.asarray(ours) - theirs.numpy())[mask == 1]).max() <= 1e-4
    again = hf.load_directory(path)
    assert again.model == model
    np.testing.assert_array_equal(again.logits(tokens, mask=mask), ours)
    with pytest.raises(ValueError, match="exists already"):
        hf.save_directory(loaded, path)


def test_rotary_positions_are_in_both_spellings():
    """Each major of transformers reads its own and ignores the other's, without a word."""
    values = FAMILIES["llama"].write_config(MODELS["llama"])
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    assert scaling.items() <= values["rope_scaling"].items()
    assert values["rope_theta"] == 500.0
    assert values["rope_parameters"] == {"rope_theta": 500.0, **values["rope_scaling"]}


def test_no_foreign_form_is_refused_and_leaves_nothing(tmp_path):
    model, params = tiny("teeny_gpt")
    with pytest.raises(ValueError, match="no Hugging Face class is a post-norm decoder"):
        hf.save_directory(Loaded(model, params), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_directories_are_named(tmp_path):
    model, params = tiny("gpt2")
    path = hf.save_directory(Loaded(model, params), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())

    def write(**changes):
        (path / "config.json").write_text(json.dumps(config | changes))

    write(model_type="rwkv9")
    with pytest.raises(ValueError, match=r"rwkv9.*gpt2"):
        hf.load_directory(path)
    write(attention_sinks=4)
    with pytest.raises(ValueError, match="attention_sinks=4"):
        hf.load_directory(path)
    write(n_embd=64)
    with pytest.raises(ValueError, match="shape"):
        hf.load_directory(path)
    write()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        hf.load_directory(path)
    weights.unlink()
    with pytest.raises(ValueError, match="missing"):
        hf.load_directory(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        hf.load_directory(path)


def test_bad_ids_are_named():
    model, params = tiny("gpt2")
    loaded = Loaded(model, params)
    for tokens, message in [
        ([[1, 61]], "id 61"),
        ([[-1, 3]], "id -1"),
        ([[0.5]], "integer"),
        ([[1] * 65], "positions for 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            loaded.logits(tokens)
    with pytest.raises(ValueError, match="mask has shape"):
        loaded.logits([[1, 2]], mask=[[1]])
    with pytest.raises(ValueError, match="only an encoder-decoder"):
        loaded.logits([[1, 2]], targets=[[1]])
    assert FAMILIES["gpt2"].build(**FAMILIES["gpt2"].tiny) == model


def test_old_names_of_norms_are_read(tmp_path):
    model, params = tiny("bert")
    path = hf.save_directory(Loaded(model, params), tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    old = {}
    for name, array in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = array
    assert old.keys() != tensors.keys()
    save_file(old, path / "model.safetensors")
    left, right = flatten(hf.load_directory(path).params), flatten(params)
    assert left.keys() == right.keys()
    assert all((left[name] == np.asarray(right[name])).all() for name in left)
