"""Opening what was trained or downloaded, `lm.load(path)`, and writing it in the other form."""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import from_json, to_json
from lm.core.mesh import param_sharding, replicated
from lm.core.paths import flatten, map_with_path, shape_differences
from lm.data.tokenizer import load_tokenizer
from lm.interop import gguf, hf, named
from lm.interop.directory import refuse_existing, whole_directory
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models import params as P
from lm.train.checkpoint import Checkpoints, load_params
from lm.train.experiment import Experiment
from lm.train.run_dir import claim_run_dir, git_commit, installed_versions
from lm.train.state import TrainState

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: Any = None,
    step: int | None = None,
    checkpoint_dir: str | Path | None = None,
) -> Loaded:
    """Opens a run, a Hugging Face directory, a GGUF file, a named model, or one of the hub.

    Args:
      path: a run directory of `lm train`; a directory with config.json and safetensors; a .gguf
        file; 'package:NAME', a model that a pinned package carries (`lm.interop.named`); or a hub
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
    elif str(path).startswith(named.PREFIX):
        loaded = named.load_named(str(path))
    elif local.suffix == ".gguf":
        loaded = gguf.load_file(local)
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


def load_merged(source: str | Path) -> Loaded:
    """Opens a model as `load` does, with an adapter merged into the kernels that it adapts."""
    loaded = load(source)
    if adapters.adapted(flatten(loaded.params)):
        loaded.params = adapters.merge(loaded.params)
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


def import_model(source: str | Path, run: str | Path) -> Path:
    """Writes a model as a run directory, whole or not at all, which all commands open.

    An adapter is merged into the kernels that it adapts.

    Args:
      source: anything that `load` opens.
      run: the directory to write.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, or there is no model.
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    loaded = load_merged(source)
    config = {
        "experiment": {"model": to_json(loaded.model)},
        "data": "",
        "init_from": str(source),
        "versions": installed_versions(),
        "commit": git_commit(),
    }
    step, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(0)
    with whole_directory(run) as scratch:
        claim_run_dir(scratch, config, loaded.tokenizer)
        with closing(Checkpoints(scratch / "checkpoints")) as checkpoints:
            checkpoints.save(TrainState(step, loaded.params, {}, key), 0, {"config": config})
    return run


def export_model(source: str | Path, directory: str | Path) -> Path:
    """Writes a model as a Hugging Face directory, whole or not at all, an adapter merged into it.

    Args:
      source: anything that `load` opens.
      directory: what to write.

    Returns:
      `directory`.

    Raises:
      ValueError: if `directory` exists, there is no model, or no Hugging Face class computes it.
    """
    return hf.save_directory(load_merged(source), Path(directory).expanduser())


def initial_params(source: str | Path | Loaded, model: Any) -> Any:
    """Returns the parameters of a source, on the host, for a model that has the same.

    Raises:
      ValueError: naming the leaves that differ in shape, or that only one of the two has.
    """
    loaded = source if isinstance(source, Loaded) else load_merged(source)
    if wrong := shape_differences(loaded.params, P.abstract(model)):
        raise ValueError(f"{loaded.name} is no start for this model: {wrong}")
    return jax.device_get(loaded.params)  # The state is laid out on a mesh, wherever they lie.


def start(experiment: Experiment) -> dict[str, Any]:
    """Returns what `lm.train.loop.train` needs to start from `experiment.init_from`.

    It is functions that return the parameters and the tokenizer, or nothing where there is no such
    start. A run that goes on calls neither, and does not need the source any more.
    """
    if not experiment.init_from:
        return {}
    opened: list[Loaded] = []

    def source() -> Loaded:
        if not opened:
            opened.append(load_merged(experiment.init_from))
        return opened[0]

    def params() -> Any:
        loaded = source()
        opened.clear()  # The run has its own copy, and the memory is wanted.
        return initial_params(loaded, experiment.model)

    return {"params": params, "tokenizer": lambda: source().tokenizer}


def download(name: str) -> Path:
    """Returns the local copy of a model of the hub, fetched where there is a network."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "vocab.txt", "merges.txt"]
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
