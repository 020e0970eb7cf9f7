"""Opening what was trained or downloaded: `lm.load(path)`."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import from_json
from lm.core.mesh import param_sharding, replicated
from lm.core.paths import flatten, map_with_path
from lm.data.tokenizer import load_tokenizer
from lm.interop import hf
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models import params as P
from lm.train.checkpoint import load_params

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: Any = None,
    step: int | None = None,
    checkpoint_dir: str | Path | None = None,
) -> Loaded:
    """Opens a run, a Hugging Face directory, or a model of the Hugging Face hub.

    Args:
      path: a run directory of `lm train`; a directory with config.json and safetensors; or a hub
        id such as 'openai-community/gpt2', where there is a network.
      dtype: of the parameters and of the computation, 'float32' or 'bfloat16'.
      mesh: a `jax.sharding.Mesh` to lay the parameters out on; None is one device.
      step: which checkpoint of a run; None is the best by validation loss.
      checkpoint_dir: of a run that keeps its checkpoints elsewhere.

    Returns:
      A `Loaded`, with `.model`, `.params`, `.tokenizer` and `.logits(tokens)`.

    Raises:
      ValueError: if there is nothing there, or what is there cannot be read.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is 'float32' or 'bfloat16', not {dtype!r}")
    local = Path(path)
    if checkpoint_dir or (local / "checkpoints").is_dir():
        loaded = load_run(local, step, checkpoint_dir)
    elif hf.is_directory(local):
        loaded = hf.load_directory(local)
    elif local.exists():
        raise ValueError(
            f"{local} is neither a run (it has no checkpoints/) nor a Hugging Face directory "
            "(its config.json names no model_type)"
        )
    elif HUB_ID.fullmatch(str(path)):
        loaded = hf.load_directory(download(str(path)))
    else:
        raise ValueError(f"there is no {path}")
    loaded.params = place(loaded.model, loaded.params, dtype, mesh)
    loaded.dtype, loaded.name = dtype, str(path)
    return loaded


def load_run(path: Path, step: int | None, checkpoint_dir: str | Path | None) -> Loaded:
    """Opens a run directory of `lm train`."""
    config = path / "config.json"
    try:
        experiment = json.loads(config.read_text())["experiment"]
        model, lora = from_json(experiment["model"]), from_json(experiment.get("adapter"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config} is not the config of a run: {error}") from error
    shapes = P.abstract(model) if lora is None else adapters.abstract(model, lora)
    params, _ = load_params(checkpoint_dir or path / "checkpoints", shapes, step)
    return Loaded(model, params, load_tokenizer(path))


def download(name: str) -> Path:
    """Returns the local copy of a model of the hub, fetched where there is a network."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The hub's client raises a dozen kinds, its own and the network's.
        raise ValueError(
            f"there is no directory {name}, and the Hugging Face hub did not give a model of that "
            f"name ({type(error).__name__}): check the name and the network, or copy the files here"
        ) from error


def place(model: Any, params: Any, dtype: str, mesh: Any) -> Any:
    """Returns parameters in a dtype on the devices of a mesh (or on the default device)."""
    axes = None if mesh is None else flatten(P.logical_axes(model))

    def put(path: str, leaf: Any) -> jax.Array:
        leaf = leaf.astype(jnp.dtype(dtype))
        if axes is None:
            return jnp.asarray(leaf)
        if path not in axes:
            return jax.device_put(leaf, replicated(mesh))
        return jax.device_put(leaf, param_sharding(mesh, axes[path], leaf.shape, path))

    return map_with_path(put, params)
