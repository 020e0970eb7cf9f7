"""Hugging Face directories, in and out: config.json, safetensors, tokenizer."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.core.paths import flatten
from lm.data.vocab_files import load_directory_tokenizer
from lm.interop.directory import read_json, refuse_existing, whole_directory, write_json
from lm.interop.loaded import Loaded
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.foreign import read_weights, write_weights
from lm.models.zoo import family_of, family_of_config

SHARD_BYTES = 5 * 10**9


def is_directory(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face model: a config that names a `model_type`."""
    config = path / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def load_directory(path: str | Path) -> Loaded:
    """Opens a Hugging Face directory as our model, parameters (fp32, numpy) and tokenizer.

    Raises:
      ValueError: for a family or config key that is not implemented, a tensor that nothing maps,
        is missing or has another shape, or a file that is absent or damaged.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    family = family_of_config(config)
    model = family.read_config(config)
    params = read_weights(
        family.weights(model), Tensors(path), P.abstract(model), ignore=family.ignore
    )
    tokenizer = load_directory_tokenizer(path)
    return Loaded(model, jax.tree.map(np.asarray, params), tokenizer, name=str(path))


def save_directory(loaded: Loaded, path: str | Path) -> Path:
    """Writes a model as a Hugging Face directory that `from_pretrained` opens.

    It appears whole or not at all. Over `SHARD_BYTES` the weights are split, with an index.

    Raises:
      ValueError: if no Hugging Face class computes this model, its parameters hold an adapter
        or quantized kernels, or `path` exists.
    """
    path = Path(path)
    family = family_of(loaded.model)
    refuse_existing(path)
    if quantized.stored(flatten(loaded.params)):
        raise ValueError(
            "these parameters hold quantized kernels, for which this format has no place: "
            "dequantize them (lm.models.quantized.dequantize)"
        )
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError(
            "these parameters hold an adapter, for which this format has no place: merge it "
            "(lm.models.adapters.merge), or write it with lm.interop.peft.save_adapter"
        )
    config = family.write_config(loaded.model)
    tensors = write_weights(family.weights(loaded.model), loaded.params)
    with whole_directory(path) as scratch:
        if loaded.tokenizer is not None:
            ids = {name: getattr(loaded.tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")}
            ids = {key.replace("_id", "_token_id"): v for key, v in ids.items() if v is not None}
            config |= ids
            write_json(scratch / "generation_config.json", ids)
            loaded.tokenizer.save(scratch)
        write_json(scratch / "config.json", config)
        _save_tensors(tensors, scratch)
    return path


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a directory by name, read one at a time from one file or from shards."""

    def __init__(self, path: Path):
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [path / name for name in names]
        else:
            files = [path / "model.safetensors"]
        self.files: dict[str, tuple[Any, str]] = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; weights are read from safetensors files only")
            try:
                # Only the flax reader knows bfloat16, which numpy has no name for.
                opened = safe_open(file, framework="flax")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged: {error}") from error
            self.files |= {modern(name): (opened, name) for name in opened.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> np.ndarray:
        file, written = self.files[name]
        return np.asarray(file.get_tensor(written))

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def modern(name: str) -> str:
    """Returns today's name of a tensor: the first BERTs called weight and bias gamma and beta."""
    return re.sub(r"(LayerNorm)\.(gamma|beta)$", lambda m: f"{m[1]}.{MODERN[m[2]]}", name)


MODERN = {"gamma": "weight", "beta": "bias"}


def _save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)
