"""Hugging Face directories, in and out: config.json, safetensors, tokenizer."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.core.paths import flatten
from lm.data.char_library import library_form
from lm.data.vocab_files import load_directory_tokenizer
from lm.interop.directory import read_json, refuse_existing, whole_directory, write_json
from lm.interop.loaded import Loaded
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.foreign import read_weights, write_weights
from lm.models.tasks import task_of
from lm.models.zoo import family_of, family_of_config

SHARD_BYTES = 5 * 10**9
# Version 4 of transformers reads the second, and 5 the first.
DTYPE_KEYS = ("dtype", "torch_dtype")


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
    names = sorted(config.get("id2label", {}).items(), key=lambda item: int(item[0]))
    labels = tuple(name for _, name in names) if task_of(model) in ("sequence", "token") else ()
    params = jax.tree.map(np.asarray, params)
    return Loaded(model, params, tokenizer, name=str(path), labels=labels)


def save_directory(loaded: Loaded, path: str | Path) -> Path:
    """Writes a model as a Hugging Face directory that `from_pretrained` opens.

    It appears whole or not at all. The weights are stored in `loaded.dtype`; over `SHARD_BYTES`
    they are split, with an index.

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
            "these parameters hold an adapter, for which this format has no place: choose the "
            "format 'merged' to merge it into its kernels, or 'peft' to write it alone"
        )
    config = family.write_config(loaded.model) | dict.fromkeys(DTYPE_KEYS, loaded.dtype)
    if len(loaded.labels) == len(config.get("id2label", ())) > 0:
        config["id2label"] = {str(index): name for index, name in enumerate(loaded.labels)}
        config["label2id"] = {name: index for index, name in enumerate(loaded.labels)}
    ids = {} if loaded.tokenizer is None else token_ids(loaded.tokenizer)
    # Readers of generation_config.json look for the start of a decoder in no other file.
    starts = {key: config[key] for key in ("decoder_start_token_id",) if key in config}
    table = family.weights(loaded.model)
    with whole_directory(path) as scratch:
        if loaded.tokenizer is not None:
            library_form(loaded.tokenizer).save(scratch)
            file = scratch / "tokenizer_config.json"
            write_json(file, read_json(file) | tokenizer_keys(config, loaded.model.max_length))
        write_json(scratch / "config.json", config | ids)
        write_json(scratch / "generation_config.json", ids | starts)
        save_tensors(write_weights(table, loaded.params, jnp.dtype(loaded.dtype)), scratch)
    return path


def tokenizer_keys(config: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """Returns what tokenizer_config.json says of the model: the longest text, and what it reads.

    Without this, version 4 of transformers gives token types to models that refuse them, and 5
    gives none to those that read them.
    """
    types = ["token_type_ids"] if "type_vocab_size" in config else []
    values = {"model_input_names": ["input_ids", *types, "attention_mask"]}
    return values if max_length is None else {**values, "model_max_length": max_length}


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of a tokenizer's special tokens by the names of a config's keys."""
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": number for name, number in ids.items() if number is not None}


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


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes tensors into a directory, in one file or, over `SHARD_BYTES`, several and an index."""
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
