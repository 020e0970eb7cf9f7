"""Writing what `lm.load` opens: as a run, merged or averaged, and in the forms of others."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import to_json
from lm.core.paths import flatten, shape_differences
from lm.interop import hf, merge, peft, stablehlo
from lm.interop.directory import refuse_existing, whole_directory
from lm.interop.loaded import Loaded
from lm.models import adapters
from lm.models import params as P
from lm.opening import Echo, Source, check_frozen, is_run, load_dequantized, silent
from lm.train.checkpoint import Checkpoints
from lm.train.run_dir import claim_run_dir, git_commit, installed_versions, read_config
from lm.train.state import TrainState


def import_model(source: Source, run: Source, echo: Echo = silent) -> Path:
    """Writes a model as a run directory, whole or not at all, which all commands open.

    Args:
      source: anything that `load` opens.
      run: the directory to write.
      echo: prints a line, of what is written otherwise than it was stored.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, there is no model, or it holds an adapter, which is for
        `merge_model`.
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    loaded = load_dequantized(source, echo)
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError(f"{source} holds an adapter: `lm merge` writes a run with it merged")
    return write_run(loaded, run, source)


def merge_model(source: Source, run: Source, echo: Echo = silent) -> Path:
    """Writes a model that holds an adapter as a run with the adapter merged into its kernels.

    Args:
      source: anything that `load` opens.
      run: the directory to write, whole or not at all.
      echo: prints a line, of what is written otherwise than it was stored.

    Returns:
      `run`.

    Raises:
      ValueError: if `run` exists, there is no adapter, or merging it changes what the model
        computes (`lm.interop.merge.merged`).
    """
    run = Path(run).expanduser()
    refuse_existing(run)
    return write_run(merge.merged(load_dequantized(source, echo)), run, source)


def average_models(
    sources: Sequence[Source],
    run: Source,
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
    first = load_dequantized(sources[0], step=checkpoints[0][1])

    def trees() -> Iterator[Any]:
        for number, (source, step) in enumerate(checkpoints):
            params = load_dequantized(source, step=step).params if number else first.params
            if adapters.adapted(flatten(params)):
                raise ValueError(f"{source} holds an adapter: merge it first (`lm merge`)")
            if wrong := shape_differences(params, first.params):
                raise ValueError(f"{source} has other shapes than {sources[0]}: {wrong}")
            yield params

    mean = P.average(trees(), weights or [1.0] * len(checkpoints))
    return write_run(dataclasses.replace(first, params=mean), run, sources[0])


def write_run(loaded: Loaded, run: Path, source: Source) -> Path:
    """Writes parameters as the only checkpoint of a new run; it has the data of a source run."""
    experiment = {"model": to_json(loaded.model), "init_from": str(source)}
    if is_run(source):
        there = read_config(source)["experiment"]
        experiment |= {key: there[key] for key in ("data",) if key in there}
    config = {
        "experiment": experiment,
        "data": "",
        "labels": list(loaded.labels),
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
    source: Source,
    directory: Source,
    format: str = "hf",
    *,
    dtype: str = "float32",
    echo: Echo = silent,
    **options: Any,
) -> Path:
    """Writes a model for others to open, whole or not at all.

    Args:
      source: anything that `load` opens.
      directory: what to write.
      format: 'hf', a Hugging Face directory; 'merged', the same with an adapter merged into the
        kernels that it adapts; 'peft', the adapter of a run alone; 'stablehlo', programs that jax
        runs without this package.
      dtype: of the weights that are stored, 'float32' or 'bfloat16'.
      echo: prints a line, of what is written otherwise than it was stored.
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
    loaded = load_dequantized(source, echo, dtype=dtype)
    return FORMATS[format](loaded, directory, **options)


def save_adapter(loaded: Loaded, directory: Path) -> Path:
    """Writes the adapter of a run as a PEFT directory that names what the run started from."""
    run = Path(loaded.name)
    if not is_run(run):
        raise ValueError(f"{run} is no run, and only a run that trained an adapter has one")
    check_frozen(run, loaded.params)
    return peft.save_adapter(loaded, directory, read_config(run)["experiment"].get("init_from", ""))


# What `export_model` writes: functions of a `Loaded`, a new directory, and options of their own.
FORMATS: dict[str, Callable[..., Path]] = {
    "hf": hf.save_directory,
    "merged": merge.save_directory,
    "peft": save_adapter,
    "stablehlo": stablehlo.save_directory,
}
