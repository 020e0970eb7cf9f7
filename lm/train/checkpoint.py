"""Checkpoints by Orbax: written in the background, whole or not at all, to any path it reads.

A checkpoint of step n holds 'params', 'rest' (optimizer state, step, key) and 'meta' (JSON: the
config, the data position, the progress of the run). Orbax writes under a temporary name and
renames at the end, so what has the name of a step is complete.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from lm.core.paths import shape_differences
from lm.train.state import TrainState

VALIDATION_LOSS = "validation_loss"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message is for the user."""


def as_path(path: str | epath.PathLike) -> epath.Path:
    """Returns an absolute path, or a remote one (gs://...) as it is."""
    text = str(path)
    return epath.Path(text if "://" in text else Path(text).expanduser().absolute())


class Checkpoints:
    """The checkpoints of one run.

    The newest `keep` stay, and the one with the smallest validation loss.
    """

    def __init__(self, directory: str | epath.PathLike, keep: int = 2, read_only: bool = False):
        """Opens the directory, and makes it unless `read_only`.

        Raises:
          CheckpointError: if it cannot be made, or is not there to be read.
        """
        if keep < 1:
            raise ValueError(f"a run keeps at least 1 checkpoint to resume from, not {keep}")
        self.directory = as_path(directory)
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"there is no directory of checkpoints {self.directory}")
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=validation_loss_of,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            # Without this Orbax keeps metrics in memory only, and a resumed run forgets its best.
            best_fn=validation_loss_of,
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        try:
            self.manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "rest": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint directory {self.directory} cannot be made or read: {reason(error)}"
            ) from error
        if not self.directory.is_dir():
            raise CheckpointError(
                f"process 0 made the checkpoint directory {self.directory}, and process "
                f"{jax.process_index()} does not see it: choose one that all hosts share, by "
                "--checkpoint-dir gs://... or on a shared disk"
            )

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the smallest validation loss, the newest if none has one, or None."""
        losses = {step: self.manager.metrics(step) for step in self.steps()}
        known = {step: validation_loss_of(loss) for step, loss in losses.items() if loss}
        return min(known, key=known.__getitem__) if known else self.latest()

    def save(
        self,
        state: TrainState,
        step: int,
        meta: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint; returns once the state is copied and may be donated.

        Args:
          state: arrays, of one process or many.
          step: its number.
          meta: JSON values.
          validation_loss: at this step, where it is known.

        Raises:
          CheckpointError: if this one, or one begun before, could not be written.
        """
        metrics = None if validation_loss is None else {VALIDATION_LOSS: validation_loss}
        rest = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        try:
            self.manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns when everything begun is on disk; CheckpointError if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits and lets go of Orbax's threads; CheckpointError as of `wait`."""
        try:
            self.wait()
        finally:
            self.manager.close()

    def _unwritten(self, error: Exception) -> CheckpointError:
        names = {path.name for path in self.directory.iterdir()}
        whole = [step for step in self.steps() if str(step) in names]
        kept = f"the one of step {whole[-1]} is whole" if whole else "there is no earlier one"
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory} ({reason(error)}); {kept}: "
            "make space there or choose another directory, and run the same command again"
        )

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON that was saved with a step; CheckpointError if it cannot be read."""
        return self._restore(step, meta=ocp.args.JsonRestore()).meta

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Returns the state of a step.

        Args:
          abstract: shapes with shardings, on any mesh; not necessarily the one it was saved from.
          step: one of `steps()`.

        Raises:
          CheckpointError: if it is of another model, or damaged.
        """
        self._check_shapes(step, abstract.params)
        rest = {"opt_state": abstract.opt_state, "step": abstract.step, "rng": abstract.rng}
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(rest),
        )
        return TrainState(params=restored.params, **restored.rest)

    def restore_params(self, abstract: Any, step: int) -> Any:
        """Returns the parameters of a step alone; arguments and errors as of `restore`."""
        self._check_shapes(step, abstract)
        return self._restore(step, params=ocp.args.StandardRestore(abstract)).params

    def _restore(self, step: int, **args: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _check_shapes(self, step: int, expected: Any) -> None:
        try:
            saved = self.manager.item_metadata(step).params
        except Exception as error:
            raise self._unreadable(step, error) from error
        if wrong := shape_differences(saved, expected):
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} is of another model: {wrong}"
            )

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory / str(step)} is not a checkpoint of this package, or is damaged "
            f"({reason(error)}): delete it to go on from another"
        )


def validation_loss_of(metrics: Mapping[str, float]) -> float:
    return metrics[VALIDATION_LOSS]


def reason(error: BaseException) -> str:
    """Returns the first line of the error at the root of an exception, cut to a readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def load_params(
    directory: str | epath.PathLike, abstract: Any, step: int | None = None
) -> tuple[Any, int]:
    """Returns the parameters of a checkpoint alone, and its step.

    Args:
      directory: of the checkpoints.
      abstract: the parameters' shapes (`lm.models.params.abstract`), with shardings or without;
        without, they come to the first device.
      step: which; None is the best by validation loss, or the newest where none was validated.

    Raises:
      CheckpointError: if there is none, or it is of another model, or damaged.
    """
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        steps = checkpoints.steps()
        step = checkpoints.best() if step is None else step
        if step is None:
            raise CheckpointError(f"{directory} holds no checkpoint: train first")
        if step not in steps:
            raise CheckpointError(f"{directory} has checkpoints of the steps {steps}, not {step}")
        device = SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
            ),
            abstract,
        )
        return checkpoints.restore_params(targets, step), step
    finally:
        checkpoints.close()
