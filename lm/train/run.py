"""One process's part of a run: devices, data, state and compiled step, ready for the next step."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm.core.batch import Batch
from lm.core.beat import come_to
from lm.core.mesh import PLACES_AXIS, make_mesh, num_batch_shards
from lm.core.runtime import CHOSEN, cache_events, settle_heap
from lm.data.tokenizer import load_tokenizer
from lm.ops.attention import choices
from lm.train.agree import check_same_code, check_same_data
from lm.train.checkpoint import Checkpoints, as_path
from lm.train.experiment import Data, Experiment
from lm.train.feed import feed
from lm.train.plan import (
    Cost,
    Plan,
    attention_line,
    choose_micro_batches,
    layout_lines,
    make_plan,
    offload_line,
)
from lm.train.run_dir import check_config, check_run_dir, claim_run_dir, config_of
from lm.train.state import (
    TrainState,
    abstract_state,
    for_devices,
    init_state,
    pad,
    state_shardings,
    strip,
)
from lm.train.step import (
    check_batch,
    check_batch_size,
    check_lengths,
    jit_evaluate,
    jit_step,
    make_train_step,
    pmap_step,
    replicate,
    share_rows,
    unreplicate,
)


@dataclass(frozen=True)
class Standing:
    """What a run remembers besides its state; saved with every checkpoint.

    Attributes:
      best_step, best_loss: of the smallest validation loss so far, or None.
      worse: validations since.
    """

    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0

    def after(self, step: int, loss: float) -> "Standing":
        """Returns the standing after a validation."""
        if self.best_loss is None or loss < self.best_loss:
            return Standing(step, loss, 0)
        return replace(self, worse=self.worse + 1)


class Run:
    """A run that can take its next step.

    Making one checks everything that can be checked, restores the newest checkpoint or makes
    fresh parameters, compiles the step, and only then writes to the run directory.

    Attributes:
      step: number of updates made.
      state: on its devices; under pmap with a leading device axis.
      standing: validations so far.
      batches: endless host batches, from the one this step takes.
      first: the first batch that it takes.
      plan: what the run costs.
      checkpoints: of the run.
      began: when it was called for, by `time.perf_counter`.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        checkpoint_dir: str | Path | None = None,
        params: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Prepares a run; arguments and errors as of `lm.train.loop.train`."""
        self.began = time.perf_counter()
        self.experiment, self.config, self.run_dir = experiment, experiment.train, run_dir
        check_same_code(experiment)
        self.is_pmap = self.config.parallel == "pmap"
        if self.is_pmap and jax.process_count() > 1:
            raise ValueError(
                f"pmap is over the devices of one process, and there are {jax.process_count()}: "
                "train with train.parallel 'jit'"
            )
        self.devices = jax.local_devices() if self.is_pmap else jax.devices()
        self.mesh = make_mesh(experiment.mesh, self.devices)
        self.recipe = for_devices(experiment.recipe(), self.devices)
        shards = num_batch_shards(self.mesh)
        check_batch_size(self.config.batch_size, self.recipe.micro_batches, shards)
        if self.is_pmap and shards != len(self.devices):
            raise ValueError(
                "pmap is plain data parallelism: leave the mesh at its default, or train with "
                "train.parallel 'jit'"
            )
        self.data = open_data(experiment.data, run_dir, tokenizer)
        check_tokenizer(self.data.tokenizer, experiment.model.vocab_size)
        labels = getattr(self.data, "labels", ())
        self.saved_config = config_of(experiment, self.data.fingerprint, labels)
        check_run_dir(run_dir, self.saved_config)

        where = as_path(checkpoint_dir or run_dir / "checkpoints")
        # From here on the processes act together, and none writes before all have looked.
        check_same_data(self.saved_config, where.is_dir())
        existing = Checkpoints(where, self.config.keep) if where.is_dir() else None
        self.step = (existing.latest() if existing else None) or 0
        if existing and self.step:
            state, self.standing = self.restore(existing)
        else:
            if experiment.init_from and params is None:
                raise ValueError(
                    f"the experiment starts from {experiment.init_from}, and no parameters were "
                    "given: train it by `lm train`, or with **lm.opening.start(experiment)"
                )
            params = params() if callable(params) else params
            state = init_state(self.recipe, self.config.seed, self.state_mesh, params)
            params = None  # Often the last to hold them: they need not lie beside the state.
            self.standing = Standing()
        self.batches = self.data.train(self.config.batch_size, self.config.seed, self.step)
        self.compile(state)
        self.plan = self.make_plan(state, where)
        self.state = replicate(state, self.devices) if self.is_pmap else state

        if jax.process_index() == 0:
            claim_run_dir(run_dir, self.saved_config, self.data.tokenizer)
        self.checkpoints = existing or Checkpoints(where, self.config.keep)
        settle_heap()

    @property
    def state_mesh(self) -> Mesh:
        """The mesh that a state is made, validated, saved and restored on."""
        if self.is_pmap:
            return make_mesh(replace(self.experiment.mesh, data=1), self.devices[:1])
        return self.mesh

    @property
    def one_state(self) -> TrainState:
        """The state without pmap's leading axis."""
        return unreplicate(self.state) if self.is_pmap else self.state

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, Standing]:
        """Returns the newest state, laid out for this run's mesh, and the standing with it."""
        shapes = abstract_state(self.recipe)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(self.recipe, self.state_mesh, shapes),
        )
        meta = checkpoints.meta(self.step)
        check_config(checkpoints.directory, meta.get("config", {}), self.saved_config)
        saved = checkpoints.restore(abstract, self.step)
        return self.relay(saved, partial(pad, self.recipe, self.state_mesh)), Standing(
            **meta["standing"]
        )

    def relay(self, state: TrainState, change: Callable[[TrainState], TrainState]) -> TrainState:
        """Returns a changed state on the run's mesh; the one that came is lost if it is another."""
        shapes = jax.eval_shape(change, state)
        if jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, state):
            return state
        shardings = state_shardings(self.recipe, self.state_mesh, shapes)
        return jax.jit(change, out_shardings=shardings)(state)

    def compile(self, state: TrainState) -> None:
        """Compiles the step for the shape of the batches, which it learns from the first."""
        self.first = first = next(
            self.data.train(self.config.batch_size, self.config.seed, self.step)
        )
        check_batch(first, self.experiment.model.vocab_size, jax.process_count() == 1)
        check_lengths(first, self.mesh)
        rows, length = first.tokens.reshape(-1, first.tokens.shape[-1]).shape
        self.shape = rows * jax.process_count(), length
        if self.config.micro_batches is None:
            shards = num_batch_shards(self.mesh)
            share = self.config.batch_size // shards
            tokens = share * rows * length // len(first.tokens) // self.mesh.shape[PLACES_AXIS]
            parts = choose_micro_batches(state.params, share, tokens)
            self.recipe = replace(self.recipe, micro_batches=parts)
        start, counts = time.perf_counter(), cache_events().copy()
        self.cost = Cost()
        if self.is_pmap:
            self.compiled = pmap_step(self.recipe, self.devices)
            with choices() as self.attention:
                jax.eval_shape(make_train_step(self.recipe), state, first)
        else:
            step = jit_step(self.recipe, self.mesh, state)
            with choices() as self.attention:
                lowered = step.lower(state, self.place(first))
            self.compiled = lowered.compile()
            self.cost = Cost.of(self.compiled)
        seconds = time.perf_counter() - start
        found, made = ((cache_events() - counts)[name] for name in ("hits", "misses"))
        source = " from the cache" if found and not made else ""
        self.compiling = f"{seconds:.1f} s{source}"
        self.evaluate = jit_evaluate(self.state_mesh)

    def take_step(self, batch: Batch) -> Mapping:
        """Dispatches one update; returns its metrics, on the device."""
        check_batch(batch, self.experiment.model.vocab_size, jax.process_count() == 1)
        if self.is_pmap:
            shared = share_rows(batch, len(self.devices))
            self.state, metrics = self.compiled(self.state, shared)
            metrics = unreplicate(metrics)
        else:
            self.state, metrics = self.compiled(self.state, self.place(batch))
        self.step += 1
        return metrics

    def validate(self) -> dict[str, float]:
        """Returns the means over the validation split.

        Raises:
          ValueError: if it is empty, or nothing in it counts.
        """
        params = self.one_state.params
        place = (lambda batch: batch) if self.is_pmap else self.place
        batches = self.data.validation(self.config.batch_size)
        total, pending = None, None
        for batch in batches:
            come_to("validation after step", self.step)
            metrics = self.evaluate(self.recipe, params, place(batch))
            # Read one batch late: the device has work meanwhile, and never a whole split in memory.
            total, pending = add(total, pending), metrics
        total = add(total, pending)
        if total is None:
            raise ValueError("the validation split is empty: set train.eval_every to 0")
        if not total["loss"][1]:
            raise ValueError("no token of the validation split counts: check its loss mask")
        return means(total)

    def save(self, validation_loss: float | None) -> None:
        """Begins to write a checkpoint of the current step."""
        meta = {
            "config": self.saved_config,
            "data_position": self.step,
            "standing": vars(self.standing),
        }
        state = self.relay(self.one_state, self.stripped)
        self.checkpoints.save(state, self.step, meta, validation_loss)

    def stripped(self, state: TrainState) -> TrainState:
        """Returns a state as a checkpoint holds it, the same whatever the mesh."""
        return state.replace(
            params=strip(self.recipe, state.params, state.params),
            opt_state=strip(self.recipe, state.params, state.opt_state),
        )

    def place(self, batch: Batch) -> Batch:
        """Returns this process's rows of a batch on the devices of the mesh."""
        return feed(batch, self.mesh)

    def make_plan(self, state: TrainState, where: Any) -> Plan:
        sizes = ", ".join(f"{name} {n}" for name, n in self.mesh.shape.items() if n > 1)
        rows, length = self.shape
        lines = {
            "objective": str(self.recipe.objective),
            "optimizer": str(self.recipe.optimizer),
            "devices": f"{len(self.devices)} x {self.devices[0].device_kind}, "
            f"{self.config.parallel}" + (f", mesh: {sizes}" if sizes else ""),
            "batch": f"{rows} rows of {length} in {self.recipe.micro_batches} parts"
            + ("" if self.config.micro_batches else " (train.micro_batches changes it)")
            + f", {self.config.dtype}",
            "attention": attention_line(self.attention),
            "remat": self.recipe.remat,
            **offload_line(self.experiment.recipe(), self.recipe, state),
            **layout_lines(self.recipe, self.mesh, state),
            **self.pipeline_line(rows),
            **CHOSEN,
            **({"XLA_FLAGS": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
            "step compiled in": self.compiling,
            "steps": f"{self.config.steps:,}"
            + (f", of which {self.step:,} are done" if self.step else ""),
            **({"data": about} if (about := getattr(self.data, "about", "")) else {}),
            **({"starts from": start} if (start := self.experiment.init_from) else {}),
            "run directory": str(self.run_dir),
            "checkpoints": str(where),
        }
        return make_plan(self.recipe, state, self.shape, self.cost, lines, self.devices)

    def pipeline_line(self, rows: int) -> dict[str, str]:
        """Returns how the rows of a batch pass through the stages, if there are several."""
        stages, shards = self.mesh.shape["stage"], num_batch_shards(self.mesh)
        part = rows // self.recipe.micro_batches
        over = self.config.pipeline.over
        return {"pipeline": str(over(stages, part, shards))} if stages > 1 else {}


def open_data(config: Any, run_dir: Path, tokenizer: Any) -> Data:
    """Returns the data of a config; where its tokenizer is '', with that of the run's start.

    Args:
      config: a `DataConfig`.
      run_dir: of the run, which has that tokenizer once it has begun.
      tokenizer: that of the start, a function that returns it, or None if there is no start.
    """
    if getattr(config, "tokenizer", None) != "":
        return config.make()
    if (run_dir / "tokenizer.json").exists():
        return config.make(load_tokenizer(run_dir))
    return config.make(tokenizer() if callable(tokenizer) else tokenizer)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises a ValueError if a tokenizer (or None) has more tokens than a model."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {vocab_size}: "
            "make the model for this tokenizer"
        )


def add(total: Mapping | None, metrics: Mapping | None) -> Mapping | None:
    """Returns fp64 sums on the host: `total` and a batch's metrics, None for none."""
    if metrics is None:
        return total
    read = jax.tree.map(np.float64, jax.device_get(metrics))
    return read if total is None else jax.tree.map(np.add, total, read)


def means(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Returns name -> sum / count, leaving out what counts nothing."""
    return {name: float(total) / float(n) for name, (total, n) in metrics.items() if float(n) != 0}
