"""Artefacts that run where this package is not, and say the same."""

import json
import re
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.infer.generate import generate_tokens
from lm.interop import hf, stablehlo
from lm.interop.loaded import Loaded
from tests.conformance.harness import tiny
from tests.models.test_adapters import LORAS, adapted

PROMPTS, COUNT = [[5, 9, 2], [7, 1, 3, 3, 8, 40]], 9
ALONE = """
import sys
for name in ("lm", "flax", "orbax", "transformers", "torch"):
    sys.modules[name] = None  # Importing it is an error.
"""


def program_of(folder) -> str:
    """Returns the program that the README of an artefact holds."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


@pytest.fixture(scope="module")
def models():
    model, params = tiny("llama")
    return {
        "gpt2": Loaded(*tiny("gpt2")),
        "llama": Loaded(model, adapted(model, params, LORAS["dora"])),
        "mamba": Loaded(*tiny("mamba")),
    }


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefacts")
    for name, loaded in models.items():
        stablehlo.save_directory(loaded, folder / name, prompt_length=8, cache_length=24)
    return {name: folder / name for name in models}


def test_programs_run_without_this_package(models, folders):
    """Greedy tokens of prompts of two lengths, by the program of the README."""
    program = program_of(folders["gpt2"])
    code = [ALONE]
    for folder in folders.values():
        words = ["x", str(folder), json.dumps(PROMPTS), str(COUNT)]
        code += [f"sys.argv = {words!r}", f"exec({program!r})"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True
    )
    for line, loaded in zip(done.stdout.splitlines(), models.values(), strict=True):
        expected = generate_tokens(
            loaded.model, loaded.params, PROMPTS, max_new_tokens=COUNT, temperature=0
        )
        assert json.loads(line) == expected.rows()


def test_manifest_says_every_shape(folders):
    manifest = json.loads((folders["llama"] / "manifest.json").read_text())
    lengths = {name: manifest[name] for name in ("batch", "prompt_length", "cache_length")}
    assert lengths == {"batch": "symbolic", "prompt_length": 8, "cache_length": 24}
    assert manifest["prefill"]["inputs"]["tokens"] == {"shape": ["b", 8], "dtype": "int32"}
    assert manifest["decode"]["inputs"]["state"] == manifest["decode"]["outputs"]["state"]
    key = manifest["decode"]["inputs"]["state"]["layers/pattern/0/mixer/k"]
    assert key == {"shape": [3, "b", 24, 2, 8], "dtype": "float32"}
    assert manifest["decode"]["outputs"]["logits"] == {"shape": ["b", 61], "dtype": "float32"}
    tensors = load_file(folders["llama"] / "model.safetensors")
    assert manifest["weights"] == {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in tensors.items()
    }
    assert any(name.endswith("lora_m") for name in tensors)


def test_lengths_tokenizer_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    loaded = Loaded(*tiny("gpt2"), tokenizer=teeny_gpt_tokenizer())
    path = stablehlo.save_directory(loaded, tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["prompt_length"], manifest["cache_length"]) == (32, 64)
    assert manifest["bos_token_id"] == 28
    assert (path / "tokenizer.json").exists() and len(list(path.glob("*.safetensors"))) > 1


def test_mistakes_write_nothing(models, tmp_path, monkeypatch):
    for name, message in [("t5", "this is EncoderDecoder"), ("bert", "this is Encoder")]:
        with pytest.raises(ValueError, match=message):
            stablehlo.save_directory(Loaded(*tiny(name)), tmp_path / "out")
    for lengths in (dict(prompt_length=9, cache_length=8), dict(prompt_length=65, cache_length=99)):
        with pytest.raises(ValueError, match="does not fit"):
            stablehlo.save_directory(models["gpt2"], tmp_path / "out", **lengths)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        stablehlo.save_directory(models["gpt2"], tmp_path / "there")

    def fail(*args, **options):
        raise OSError("no space")

    monkeypatch.setattr(stablehlo, "save_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        stablehlo.save_directory(models["mamba"], tmp_path / "out", prompt_length=1, cache_length=2)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
