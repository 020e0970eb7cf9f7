"""A whole run as one value: `experiments/NAME.py` has a function that returns an `Experiment`."""

import difflib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import flax.linen as nn

from lm.core.batch import Batch
from lm.core.mesh import MeshShape
from lm.core.pipeline import GPIPE, Pipeline
from lm.models.adapters import LoRA
from lm.models.stack import REMAT_POLICIES
from lm.ops.attention import BACKENDS, CONTEXT_PARALLEL
from lm.ops.quantize import KINDS
from lm.train.objectives import Generative, Objective
from lm.train.optimizer import Optimizer
from lm.train.state import Recipe
from lm.train.trainable import Table, table_of

GENERATIVE = Generative()
ALL_DATA = MeshShape()


class Data(Protocol):
    """What a run reads; `experiment.data.make()` returns one.

    Attributes:
      tokenizer: saved with the run, or None.
      fingerprint: changes whenever the data do; a run is not resumed on other data.
      about: a line for the plan; it may be missing.
    """

    tokenizer: Any
    fingerprint: str

    def train(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        """Returns this process's rows of the global batches `start`, `start + 1`, ...

        Global batch k is a function of the data, the seed and k alone.
        """
        ...

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Returns batches of held-out text, the same each time; padding fills the last one."""
        ...


class DataConfig(Protocol):
    """A frozen dataclass that says what data to read.

    Where it has a field `tokenizer` that is '', `make` is given the tokenizer of the model that
    the run starts from.
    """

    def make(self) -> Data: ...


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often.

    Attributes:
      steps: number of updates.
      batch_size: rows of a global batch.
      micro_batches: parts that a batch is computed in, one after the other; same result, less
        memory, and on CPU more speed. None chooses (`lm.train.plan.choose_micro_batches`).
      eval_every: steps between validations; 0 for none.
      checkpoint_every: steps between checkpoints; 0 for only those at the end and at each better
        validation loss.
      log_every: steps between lines of metrics.jsonl.
      keep: number of newest checkpoints that stay, beside the best.
      patience: validations in a row without a better loss after which to stop; 0 for never.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      remat: what the backward pass computes again of each layer: 'none'; 'dots', all but the
        products of projections; 'full', all; 'offload', as 'dots', with those products kept in the
        memory of an accelerator's host.
      attention: backend of attention (`lm.ops.attention.BACKENDS`), or 'auto' to choose by the
        platform, the length and the mask; the plan says which.
      context_parallel: how attention reaches keys on other devices, where the mesh has a sequence
        axis: 'ulysses', places exchanged for heads, which the devices must divide; or 'ring', keys
        passed from device to device.
      sequence_parallel: whether the devices of a tensor axis divide the places of a row between the
        layers (Korthikanti et al., 2022): same result, as many bytes sent, and 1/tensor of what
        norms, dropout and the residual stream keep for the backward pass.
      frozen_dtype: what parameters that do not train are stored in, 'float32' or 'bfloat16'; or
        what kernels of projections that do not train are quantized as, 'int8', 'int4' or 'nf4'
        (QLoRA; Dettmers et al., 2023).
      offload_optimizer: whether the optimizer's moments lie in the memory of an accelerator's host
        between steps, and come to the device for the update: same result, less of its memory.
      seed: of parameters, order of data, dropout.
      parallel: 'jit' on a mesh, or 'pmap' over local devices.
      pipeline: how rows pass through the layers where the mesh has several stages.
    """

    steps: int
    batch_size: int
    micro_batches: int | None = None
    eval_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 10
    keep: int = 2
    patience: int = 0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    context_parallel: str = "ulysses"
    sequence_parallel: bool = False
    frozen_dtype: str = "float32"
    seed: int = 0
    parallel: str = "jit"
    pipeline: Pipeline = GPIPE
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        least = dict(steps=0, batch_size=1, micro_batches=1, eval_every=0, checkpoint_every=0)
        for name, low in (least | dict(log_every=1, keep=1, patience=0, seed=0)).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"train.{name} is {low} or more, not {getattr(self, name)}")
        allowed = {
            "dtype": ("float32", "bfloat16"),
            "remat": tuple(REMAT_POLICIES),
            "attention": ("auto", *BACKENDS),
            "context_parallel": CONTEXT_PARALLEL,
            "frozen_dtype": ("float32", "bfloat16", *KINDS),
            "parallel": ("jit", "pmap"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"train.{name} is one of {', '.join(values)}, not {getattr(self, name)!r}"
                )
        for name in ("offload_optimizer", "sequence_parallel"):
            if getattr(self, name) and self.parallel == "pmap":
                raise ValueError(
                    f"pmap keeps the whole state on each device: leave train.{name} off, or train "
                    "with train.parallel 'jit'"
                )


@dataclass(frozen=True)
class Experiment:
    """Everything that decides what a run computes.

    Attributes:
      name: names its run directory.
      model: a model value.
      data: what it reads.
      optimizer: with the learning rate.
      train: how long and how often.
      objective: what is minimised.
      trainable: the table of what trains; None is everything, or if there is an adapter that alone
        and the head of a task. By name: 'full' is everything, without the adapter, and 'adapter' is
        what None is, where there is one.
      adapter: low-rank leaves beside the model's kernels, or None.
      init_from: what to start from, anything that `lm.load` opens; '' is fresh parameters.
      mesh: how the devices are laid out.
      wandb: project to log to on Weights & Biases, '' for none.
    """

    name: str
    model: nn.Module
    data: Any
    optimizer: Optimizer
    train: TrainConfig
    objective: Objective = GENERATIVE
    trainable: Table | Literal["full", "adapter"] | None = None
    adapter: LoRA | None = None
    init_from: str = ""
    mesh: MeshShape = ALL_DATA
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.trainable == "adapter" and self.adapter is None:
            raise ValueError("the experiment has no adapter that could train alone: give it one")
        # What a name says stands in these two fields, so that equal experiments have one config.
        if self.trainable == "full":
            object.__setattr__(self, "adapter", None)
        if isinstance(self.trainable, str):
            object.__setattr__(self, "trainable", None)

    @property
    def table(self) -> Table:
        """The table of what trains, where `trainable` does not say it, too."""
        return table_of(self.trainable, self.model, self.adapter)

    def recipe(self) -> Recipe:
        """Returns what the train step needs of it, with schedules as long as the run.

        Where the number of micro-batches is left open it is 1; a run chooses it when it has seen
        the shape of its batches.
        """
        assert not isinstance(self.trainable, str)
        recipe = Recipe(
            self.model,
            self.objective,
            self.optimizer,
            self.table,
            self.train.micro_batches or 1,
            self.train.dtype,
            self.train.remat,
            self.adapter,
            self.train.frozen_dtype,
            self.train.attention,
            self.train.context_parallel,
            self.train.pipeline,
            self.train.offload_optimizer,
            self.train.sequence_parallel,
        )
        return recipe.over(self.train.steps)


# What may change between a run and its continuation: none of it says what is computed.
FREE = (
    "mesh",
    "train.parallel",
    "train.micro_batches",
    "train.context_parallel",
    "train.sequence_parallel",
    "train.pipeline",
    "train.offload_optimizer",
    "train.keep",
    "train.log_every",
    "wandb",
)


def load_experiment(path: str | Path) -> Experiment:
    """Returns the experiment of a file, `experiments/NAME.py` or NAME alone.

    Raises:
      ValueError: if there is no such file, or it has no `experiment()` that returns one.
    """
    file = find_experiment(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "experiment", None)
    if not inspect.isfunction(make):
        raise ValueError(f"{file} has no function experiment() that returns an Experiment")
    experiment = make()
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"experiment() of {file} returns a {type(experiment).__name__}, not an Experiment"
        )
    return experiment


def find_experiment(path: str | Path) -> Path:
    """Returns the file of an experiment; ValueError with the nearest name there is."""
    for file in (Path(path), Path("experiments") / f"{path}.py"):
        if file.suffix == ".py" and file.is_file():
            return file
    folder = Path(path).parent if Path(path).suffix == ".py" else Path("experiments")
    names = sorted(file.stem for file in folder.glob("*.py"))
    near = difflib.get_close_matches(Path(path).stem, names, 1, cutoff=0.0)
    hint = f"did you mean {folder / near[0]}.py?" if near else f"{folder} has none"
    raise ValueError(f"there is no experiment {str(path)!r}: {hint}")
