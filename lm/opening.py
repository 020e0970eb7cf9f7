"""Opening what was trained or downloaded, `lm.load(path)`, and writing it in the other form."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import from_json, to_json
from lm.core.mesh import param_sharding, replicated
from lm.core.paths import flatten, map_with_path, shape_differences
from lm.data.tokenizer import load_tokenizer
from lm.interop import gguf, hf, merge, named, stablehlo
from lm.interop.directory import refuse_existing, whole_directory
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models import params as P
from lm.train.checkpoint import Checkpoints, load_params
from lm.train.run_dir import claim_run_dir, git_commit, installed_versions, read_config
from lm.train.state import TrainState

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What `export_model` writes: functions of a `Loaded`, a new directory, and options of their own.
FORMATS: dict[str, Callable[..., Path]] = {
    "hf": hf.save_directory,
    "merged": merge.save_directory,
    "stablehlo": stablehlo.save_directory,
}


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
    if checkpoint_dir or is_run(local):
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

    Args:
      source: anything that `load` opens.
      run: the directory to write.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, there is no model, or it holds an adapter, which is for
        `merge_model`.
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    loaded = load(source)
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError(f"{source} holds an adapter: `lm merge` writes a run with it merged")
    return write_run(loaded, run, source)


def merge_model(source: str | Path, run: str | Path) -> Path:
    """Writes a model that holds an adapter as a run with the adapter merged into its kernels.

    Args:
      source: anything that `load` opens.
      run: the directory to write, whole or not at all.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, there is no adapter, or merging it changes what the model
        computes (`lm.interop.merge.merged`).
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    return write_run(merge.merged(load(source)), run, source)


def average_models(
    sources: Sequence[str | Path],
    run: str | Path,
    *,
    weights: Sequence[float] = (),
    steps: Sequence[int] = (),
) -> Path:
    """Writes the weighted mean of checkpoints as a run (model soups, Wortsman et al., 2022).

    The sum is fp64. Model, tokenizer and data are those of the first.

    Args:
      sources: what `load` opens, of the same shapes.
      run: the directory to write, whole or not at all.
      weights: one for each checkpoint, divided by their sum; () is the plain mean.
      steps: checkpoints of one run, in place of its best.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, there are fewer than two checkpoints, or steps of several runs;
        the weights are not as many, or negative, or all 0; shapes differ, naming the leaves; or
        there are adapters, whose mean is not that of what they add.
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    if steps and not (len(sources) == 1 and is_run(sources[0])):
        raise ValueError(f"steps are of one run, and not of {', '.join(map(str, sources))}")
    checkpoints = [(sources[0], step) for step in steps] or [(source, None) for source in sources]
    if len(checkpoints) < 2:
        raise ValueError("an average is of two checkpoints or more: name runs, or steps of one run")
    if weights and len(weights) != len(checkpoints):
        raise ValueError(f"there are {len(checkpoints)} checkpoints and {len(weights)} weights")
    first = load(sources[0], step=checkpoints[0][1])

    def trees() -> Iterator[Any]:
        for number, (source, step) in enumerate(checkpoints):
            params = load(source, step=step).params if number else first.params
            if adapters.adapted(flatten(params)):
                raise ValueError(f"{source} holds an adapter: merge it first (`lm merge`)")
            if wrong := shape_differences(params, first.params):
                raise ValueError(f"{source} has other shapes than {sources[0]}: {wrong}")
            yield params

    mean = P.average(trees(), weights or [1.0] * len(checkpoints))
    return write_run(dataclasses.replace(first, params=mean), run, sources[0])


def is_run(source: str | Path) -> bool:
    """Whether a source is a run directory with its checkpoints."""
    return (Path(source) / "checkpoints").is_dir()


def write_run(loaded: Loaded, run: Path, source: str | Path) -> Path:
    """Writes parameters as the only checkpoint of a new run; it has the data of a source run."""
    experiment = {"model": to_json(loaded.model)}
    if is_run(source):
        there = read_config(source)["experiment"]
        experiment |= {key: there[key] for key in ("data",) if key in there}
    config = {
        "experiment": experiment,
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


def export_model(
    source: str | Path,
    directory: str | Path,
    format: str = "hf",
    *,
    dtype: str = "float32",
    **options: Any,
) -> Path:
    """Writes a model for others to open, whole or not at all.

    Args:
      source: anything that `load` opens.
      directory: what to write.
      format: 'hf', a Hugging Face directory; 'merged', the same with an adapter merged into the
        kernels that it adapts; 'stablehlo', programs that jax runs without this package.
      dtype: of the weights that are stored, 'float32' or 'bfloat16'.
      options: more that the format's function takes (`lm.interop.stablehlo.save_directory`).

    Returns:
      `directory`.

    Raises:
      ValueError: if `directory` exists, there is no model, the format cannot say it, or merging
        changes what it computes.
    """
    directory = Path(directory).expanduser()
    refuse_existing(directory)
    if format not in FORMATS:
        raise ValueError(f"a format is one of {', '.join(FORMATS)}, not {format!r}")
    return FORMATS[format](load(source, dtype=dtype), directory, **options)


def initial_params(source: str | Path, model: Any) -> Any:
    """Returns the parameters of a source, on the host, for a model that has the same.

    Raises:
      ValueError: naming the leaves that differ in shape, or that only one of the two has.
    """
    params = load_merged(source).params
    if wrong := shape_differences(params, P.abstract(model)):
        raise ValueError(f"{source} is no start for this model: {wrong}")
    return jax.device_get(params)  # The state is laid out on a mesh, from wherever they come.


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
