"""Artefacts that run where this package is not, and say the same."""

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from lm.data.tokenizer import teeny_gpt_tokenizer
from lm.infer.generate import generate_tokens
from lm.interop import hf, stablehlo
from lm.interop.loaded import Loaded
from tests.conformance.harness import FAMILIES, tiny
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


@functools.cache
def loaded_of(name: str) -> Loaded:
    """Returns a tiny decoder; the llama has an adapter."""
    model, params = tiny(name)
    return Loaded(model, adapted(model, params, LORAS["dora"]) if name == "llama" else params)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefacts")

    @functools.cache
    def write(name: str):
        lengths = dict(prompt_length=8, cache_length=24)
        return stablehlo.save_directory(loaded_of(name), folder / name, **lengths)

    return write


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "mamba"))]
)
@pytest.mark.slow
def test_programs_run_without_this_package(name, folder_of):
    """Greedy tokens of prompts of two lengths, by the program of the README."""
    code = ALONE + program_of(folder_of(name))
    words = [str(folder_of(name)), json.dumps(PROMPTS), str(COUNT)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=True)
    loaded, options = loaded_of(name), dict(max_new_tokens=COUNT, temperature=0)
    expected = generate_tokens(loaded.model, loaded.params, PROMPTS, **options)
    assert json.loads(done.stdout) == expected.rows()


def test_manifest_says_every_shape(folder_of):
    folder = folder_of("llama")
    manifest = json.loads((folder / "manifest.json").read_text())
    lengths = {name: manifest[name] for name in ("batch", "prompt_length", "cache_length")}
    assert lengths == {"batch": "symbolic", "prompt_length": 8, "cache_length": 24}
    assert manifest["prefill"]["inputs"]["tokens"] == {"shape": ["b", 8], "dtype": "int32"}
    assert manifest["decode"]["inputs"]["state"] == manifest["decode"]["outputs"]["state"]
    key = manifest["decode"]["inputs"]["state"]["layers/pattern/0/mixer/k"]
    assert key == {"shape": [3, "2*b", 24, 8], "dtype": "float32"}
    assert manifest["decode"]["outputs"]["logits"] == {"shape": ["b", 61], "dtype": "float32"}
    tensors = load_file(folder / "model.safetensors")
    assert manifest["weights"] == {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in tensors.items()
    }
    assert any(name.endswith("lora_m") for name in tensors)


def test_lengths_tokenizer_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    loaded = replace(loaded_of("llama"), tokenizer=teeny_gpt_tokenizer())
    path = stablehlo.save_directory(loaded, tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["prompt_length"], manifest["cache_length"]) == (32, 64)
    assert manifest["bos_token_id"] == 28
    assert (path / "tokenizer.json").exists() and len(list(path.glob("*.safetensors"))) > 1


def test_mistakes_write_nothing(tmp_path, monkeypatch):
    for name, message in [("t5", "this is EncoderDecoder"), ("bert", "this is Encoder")]:
        with pytest.raises(ValueError, match=message):
            model = FAMILIES[name].build(**FAMILIES[name].tiny)
            stablehlo.save_directory(Loaded(model, {}), tmp_path / "out")
    for lengths in (dict(prompt_length=9, cache_length=8), dict(prompt_length=65, cache_length=99)):
        with pytest.raises(ValueError, match="does not fit"):
            stablehlo.save_directory(loaded_of("llama"), tmp_path / "out", **lengths)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        stablehlo.save_directory(loaded_of("llama"), tmp_path / "there")

    def fail(*args, **options):
        raise OSError("no space")

    monkeypatch.setattr(stablehlo, "save_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        stablehlo.save_directory(loaded_of("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
