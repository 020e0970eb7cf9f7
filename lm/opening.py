"""Opening what was trained or downloaded: `lm.load(path)`."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import from_json
from lm.core.mesh import param_sharding, replicated
from lm.core.paths import flatten, map_with_path, partition, shape_differences, unflatten
from lm.core.paths import merge as join
from lm.data.tokenizer import load_tokenizer
from lm.interop import gguf, hf, merge, named, peft
from lm.interop.loaded import Loaded
from lm.interop.peft_config import base_of, check_base
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.tasks import HEAD, part_of, task_of
from lm.ops.quantize import KINDS
from lm.train.checkpoint import load_params
from lm.train.experiment import Experiment
from lm.train.run_dir import read_config
from lm.train.state import fresh_params, frozen_kernels
from lm.train.trainable import table_of, trained_paths

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Source = str | Path
Echo = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""


def load(
    path: Source,
    *,
    adapter: Source | Sequence[Source] | None = None,
    dtype: str = "float32",
    mesh: Any = None,
    step: int | None = None,
    checkpoint_dir: Source | None = None,
) -> Loaded:
    """Opens a run, a Hugging Face directory, a GGUF file, a named model, or one of the hub.

    Args:
      path: a run directory of `lm train`; a directory with config.json and safetensors; a .gguf
        file; 'package:NAME', a model that a pinned package carries (`lm.interop.named`); or a hub
        id such as 'openai-community/gpt2', where there is a network.
      adapter: a PEFT directory, or a run that trained an adapter, to put beside the kernels; or a
        sequence of them, of which each row of a batch uses one, by number.
      dtype: of the parameters and of the computation, 'float32' or 'bfloat16'.
      mesh: a `jax.sharding.Mesh` to lay the parameters out on; None is one device.
      step: which checkpoint of a run; None is the best by validation loss.
      checkpoint_dir: of a run that keeps its checkpoints elsewhere.

    Returns:
      A `Loaded`, with `.model`, `.params`, `.tokenizer` and `.logits(tokens)`.

    Raises:
      ValueError: if there is nothing there, or what is there cannot be read; if an adapter is of
        another base, or would lie beside another.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is 'float32' or 'bfloat16', not {dtype!r}")
    local = Path(path)
    if peft.is_directory(local) and adapter is None:
        raise ValueError(
            f"{local} holds a PEFT adapter: open its base with it, --adapter {local} or "
            f"lm.load(BASE, adapter={str(path)!r})"
        )
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
    loaded.name = str(path)
    if adapter is not None:
        loaded = with_adapters(loaded, adapter)
    loaded.params = place(loaded.model, loaded.params, dtype, mesh)
    loaded.dtype = dtype
    return loaded


def with_adapters(loaded: Loaded, adapter: Source | Sequence[Source]) -> Loaded:
    """Returns a model with an adapter, or with several; arguments and errors as of `load`."""
    if isinstance(adapter, str | Path):
        return with_adapter(loaded, Path(adapter))
    if len(adapter) == 0:
        raise ValueError("there is no adapter: give at least one, or adapter=None")
    opened = [with_adapter(loaded, Path(one)) for one in adapter]
    if any(task_of(one.model) is not None for one in opened):
        raise ValueError("each adapter of a classifier has a head of its own: open one at a time")
    each = [adapters.split(one.params)[1] for one in opened]
    return dataclasses.replace(loaded, params=adapters.stack(loaded.params, each))


def with_adapter(loaded: Loaded, path: Path) -> Loaded:
    """Returns a model with the adapter of a PEFT directory or of a run."""
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError(
            f"{loaded.name} holds an adapter already, and {path} cannot lie beside it: open their "
            "base with both of them, or merge the first one into it"
        )
    if peft.is_directory(path):
        return peft.load_adapter(loaded, path)
    if not is_run(path):
        raise ValueError(
            f"{path} is neither a PEFT directory (it has no adapter_config.json) nor a run (it has "
            "no checkpoints/)"
        )
    run = load_run(path, None, None)
    check_frozen(path, run.params)
    # A classifier brings the head that it trained, whatever head the base has.
    classifies = task_of(run.model) is not None
    brought = ("head", *HEAD) if classifies else ()

    def body(params: Any) -> dict:
        return partition(params, lambda name: part_of(name) not in brought)[0]

    if wrong := shape_differences(body(P.abstract(run.model)), body(P.abstract(loaded.model))):
        raise ValueError(f"{path} is an adapter of another base: {wrong}")
    if loaded.model != run.model:
        check_base(base_of(run.model), base_of(loaded.model), path)
    leaves, _ = partition(
        run.params, lambda name: adapters.is_adapter(name) or part_of(name) in brought
    )
    if classifies:
        own = dict(model=run.model, labels=run.labels, tokenizer=loaded.tokenizer or run.tokenizer)
        loaded = dataclasses.replace(loaded, **own)
    return dataclasses.replace(loaded, params=join(body(loaded.params), leaves))


def is_run(source: Source) -> bool:
    """Whether a source is a run directory with its checkpoints."""
    return (Path(source) / "checkpoints").is_dir()


def check_frozen(path: Path, params: Any) -> None:
    """Refuses a run that trained more than an adapter and a classifier's head, or no adapter.

    Raises:
      ValueError: naming a parameter of the base that it trained.
    """
    if not adapters.adapted(flatten(params)):
        raise ValueError(f"the run {path} holds no adapter")
    experiment = read_config(path)["experiment"]
    names = ("trainable", "model", "adapter")
    trained = trained_paths(table_of(*(from_json(experiment.get(n)) for n in names)), params)
    heads = HEAD if "classifier" in params else ()
    others = [p for p in trained if not adapters.is_adapter(p) and part_of(p) not in heads]
    if others := sorted(others):
        raise ValueError(
            f"the run {path} trained {others[0]} beside its adapter, so that the adapter alone is "
            "not what it learned: open the run itself, or export it with --format merged"
        )


def load_dequantized(source: Source, echo: Echo = silent, **options: Any) -> Loaded:
    """Opens a model as `load` does, with fp32 kernels for quantized ones, which `echo` is told."""
    loaded = load(source, **options)
    if not quantized.stored(flatten(loaded.params)):
        return loaded
    echo("quantized kernels are written dequantized, in fp32")
    params = quantized.dequantize(loaded.model, loaded.params)
    return dataclasses.replace(loaded, params=params)


def load_merged(source: Source) -> Loaded:
    """Opens a model dequantized, with an adapter merged into the kernels that it adapts."""
    loaded = load_dequantized(source)
    return merge.merged(loaded) if adapters.adapted(flatten(loaded.params)) else loaded


def load_run(path: Path, step: int | None, checkpoint_dir: Source | None) -> Loaded:
    """Opens a run directory of `lm train`."""
    config = path / "config.json"
    try:
        content = json.loads(config.read_text())
        experiment, labels = content["experiment"], tuple(content.get("labels", ()))
        model, lora = from_json(experiment["model"]), from_json(experiment.get("adapter"))
        kind = experiment.get("train", {}).get("frozen_dtype")
        table = table_of(from_json(experiment.get("trainable")), model, lora)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config} is not the config of a run: {error}") from error
    shapes = P.abstract(model) if lora is None else adapters.abstract(model, lora)
    if kind in KINDS:
        frozen = frozen_kernels(model, table, shapes)
        shapes = quantized.abstract(model, shapes, kind, frozen)
    params, _ = load_params(checkpoint_dir or path / "checkpoints", shapes, step)
    return Loaded(model, params, load_tokenizer(path), labels=labels)


def initial_params(source: Source | Loaded, model: Any, seed: int = 0, echo: Echo = print) -> Any:
    """Returns the parameters of a source, on the host, for a model with the same body.

    Leaves of the pooler and the classifier that the source lacks are fresh, as a run of this seed
    would draw them. Those that only the source has are left out, and so are its classifier where it
    is for another task and its head where the model has none. One line names both.

    Args:
      source: anything that `load` opens, an adapter being merged into the kernels that it adapts;
        or what `load_merged` returned.
      model: what is to start from it.
      seed: of fresh leaves.
      echo: prints that line.

    Raises:
      ValueError: naming the leaves that differ in shape, or that only one of the two has.
    """
    loaded = source if isinstance(source, Loaded) else load_merged(source)
    there, here = flatten(loaded.params), flatten(P.abstract(model))
    spare = HEAD if getattr(model, "head", None) is not None else ("head", *HEAD)
    foreign = [path for path in there if path not in here and part_of(path) in spare]
    if task_of(loaded.model) != task_of(model):
        foreign += [path for path in there if path in here and part_of(path) == "classifier"]
    kept = {path: leaf for path, leaf in there.items() if path not in foreign}
    fresh = [path for path in here if path not in kept and part_of(path) in HEAD]
    rest = {path: leaf for path, leaf in here.items() if path not in fresh}
    if wrong := shape_differences(unflatten(kept), unflatten(rest)):
        raise ValueError(f"{loaded.name} is no start for this model: {wrong}")
    if fresh or foreign:
        names = {"fresh": fresh, "left out": foreign}
        found = [f"{what}: {', '.join(paths)}" for what, paths in names.items() if paths]
        echo(f"starts from {loaded.name}; {'; '.join(found)}")
    if fresh:
        # Compiled alone, it draws these leaves and no others.
        draw = jax.jit(lambda: [flatten(fresh_params(model, seed))[path] for path in fresh])
        kept |= dict(zip(fresh, draw()))
    # The state is laid out on a mesh, from wherever they come.
    return jax.device_get(unflatten(kept))


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
        return initial_params(loaded, experiment.model, experiment.train.seed)

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
    """Returns parameters in a dtype on the devices of a mesh (or on the default device).

    Codes and scales of quantized kernels keep theirs, and give kernels of the compute dtype.
    """
    axes = None if mesh is None else quantized.logical_axes(model)

    def put(path: str, leaf: Any) -> jax.Array:
        if not quantized.is_quantized(path):
            leaf = leaf.astype(jnp.dtype(dtype))
        if axes is None:
            return jnp.asarray(leaf)
        if path not in axes:
            return jax.device_put(leaf, replicated(mesh))
        return jax.device_put(leaf, param_sharding(mesh, axes[path], leaf.shape, path))

    return map_with_path(put, params)
