"""The one train step: pretraining and every finetuning differ in the recipe, not in the step.

`train_step` is a pure function. `jit_step` runs it on a mesh, the main road; `pmap_step` runs it
over local devices as plain data parallelism. Both give the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lm.core.batch import Batch, split_rows
from lm.core.context import Context
from lm.core.mesh import (
    PLACES_AXIS,
    batch_sharding,
    check_places,
    places_sharding,
    replicated,
)
from lm.core.paths import merge
from lm.train.objectives import Metrics
from lm.train.state import Recipe, TrainState, abstract_state, state_shardings, strip

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
DEVICES = "devices"


def gradients(
    recipe: Recipe, params: Any, batch: Batch, key: jax.Array, axis_name: str | None = None
) -> tuple[Any, Metrics]:
    """Returns the gradient of the mean loss for the trained parameters, and the batch's metrics.

    The gradients of the micro-batches' loss *sums* are added, and divided by the weight of them
    all, so that uneven padding weighs as it does in one batch.

    Args:
      recipe: the run's.
      params: all parameters.
      batch: (B, ...) with B a multiple of `recipe.micro_batches`.
      key: of dropout and of random objectives; each micro-batch and device folds in its number.
      axis_name: mapped axis to sum over (pmap), or None.
    """
    trained, frozen = recipe.split(params)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def loss(trained, batch, key):
        metrics = losses(recipe, merge(trained, frozen), batch, recipe.context(), key)
        return metrics["loss"][0], metrics

    sums = sum_over_micro_batches(
        lambda batch, key: jax.grad(loss, has_aux=True)(trained, batch, key),
        batch,
        key,
        recipe.micro_batches,
    )
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    grads, metrics = sums
    weight = metrics["loss"][1]
    # The host refuses a batch that weighs nothing; here it must not turn parameters into NaN.
    scale = jnp.where(weight == 0, 0.0, 1.0 / jnp.where(weight == 0, 1.0, weight))
    return jax.tree.map(lambda g: g * scale, grads), metrics


def losses(recipe: Recipe, params: Any, batch: Batch, ctx: Context, key: jax.Array) -> Metrics:
    """Returns the objective's sums: 'loss' and its own metrics."""
    params = strip(recipe, params, params)
    loss_sum, weight_sum, metrics = recipe.objective(recipe.model, params, batch, ctx, key)
    return {"loss": (loss_sum, weight_sum), **metrics}


def evaluate_batch(recipe: Recipe, params: Any, batch: Batch) -> Metrics:
    """Returns the metrics of a batch without dropout; random objectives draw the same each time."""

    def one(batch, key):
        return losses(recipe, params, batch, recipe.context(deterministic=True), key)

    return sum_over_micro_batches(one, batch, jax.random.PRNGKey(0), recipe.micro_batches)


def sum_over_micro_batches(
    function: Callable[[Batch, jax.Array], Any], batch: Batch, key: jax.Array, parts: int
) -> Any:
    """Returns the sum of `function(micro_batch, key)` over the parts of a batch, one at a time."""
    if parts == 1:
        return function(batch, key)
    micro = jax.tree.map(partial(split_rows, parts=parts), batch)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first, key)
    )
    sums, _ = jax.lax.scan(
        lambda sums, xs: (jax.tree.map(jnp.add, sums, function(*xs)), None),
        zeros,
        (micro, jax.random.split(key, parts)),
    )
    return sums


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and the metrics of the batch before it.

    Args:
      recipe: static.
      state: before.
      batch: one batch, or one device's share of it under pmap.
      axis_name: of pmap, or None.

    Returns:
      The new state, and name -> (sum, count): 'loss' in nats, 'grad_norm' (before clipping),
      'learning_rate', and the objective's own.
    """
    key = jax.random.fold_in(state.rng, state.step)
    grads, metrics = gradients(recipe, state.params, batch, key, axis_name)
    trained, frozen = recipe.split(state.params)
    updates, opt_state = recipe.transform(state.params).update(grads, state.opt_state, trained)
    params = merge(optax.apply_updates(trained, updates), frozen)
    one = jnp.ones(())
    metrics = {
        **metrics,
        "grad_norm": (optax.tree.norm(grads), one),
        "learning_rate": (recipe.optimizer.learning_rate(state.step), one),
    }
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def make_train_step(recipe: Recipe) -> Step:
    """Returns `train_step` of a recipe, a pure function of state and batch."""
    return partial(train_step, recipe)


def jit_step(recipe: Recipe, mesh: Mesh, state: TrainState | None = None) -> Step:
    """Returns the train step compiled for a mesh; it donates the state.

    Args:
      recipe: the run's.
      mesh: its devices.
      state: an example for its shapes, where they are not those of a fresh model.

    Raises:
      ValueError: if the residual stream is to be divided, and the mesh has no axis for it.
    """
    if recipe.sequence_parallel and mesh.shape["tensor"] == 1:
        raise ValueError(
            "train.sequence_parallel divides the residual stream over the mesh's axis tensor, "
            "which is 1: ask for more, such as --mesh tensor=2, or leave it off"
        )
    shapes = abstract_state(recipe, mesh) if state is None else state
    shardings = state_shardings(recipe, mesh, shapes)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # A kernel is divided over the mesh by itself, and so has to know it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(recipe, state, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, batch_shardings(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def batch_shardings(mesh: Mesh, batch: Batch | None = None) -> Batch:
    """Returns the sharding of every field of a batch: of its rows, and of the places they have.

    Args:
      mesh: to lie on.
      batch: of arrays or shapes; fields that it lacks are None. None has all fields.
    """
    every = {field.name: places_sharding(mesh) for field in fields(Batch)}
    every["labels"] = batch_sharding(mesh)
    lacking = [name for name in every if getattr(batch, name, "") is None]
    return Batch(**every | dict.fromkeys(lacking))


def check_lengths(batch: Batch, mesh: Mesh) -> None:
    """Raises a ValueError if a mesh does not divide the places of a batch's rows."""
    devices = mesh.shape[PLACES_AXIS]
    if devices == 1:
        return
    if batch.tokens.ndim != 2:
        raise ValueError(
            f"rows of several choices, {batch.tokens.shape}, have no one dimension of places that "
            f"the mesh's {PLACES_AXIS}={devices} could divide: leave that axis at 1"
        )
    for ids in (batch.tokens, batch.source):
        if ids is not None:
            check_places(ids.shape[1], sequence=devices)


def jit_evaluate(mesh: Mesh) -> Callable[[Recipe, Any, Batch], Metrics]:
    """Returns `evaluate_batch` compiled for a mesh."""

    @wraps(evaluate_batch)
    def evaluate(recipe: Recipe, params: Any, batch: Batch) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return evaluate_batch(recipe, params, batch)

    return jax.jit(evaluate, static_argnums=0)


def pmap_step(recipe: Recipe, devices: Sequence[Any] | None = None) -> Step:
    """Returns the train step over local devices; state and batch have a leading device axis."""
    return jax.pmap(
        partial(train_step, recipe, axis_name=DEVICES),
        axis_name=DEVICES,
        devices=devices,
        donate_argnums=0,
    )


def replicate(state: TrainState, devices: Sequence[Any]) -> TrainState:
    """Returns a state for `pmap_step`: every leaf once on each device."""
    return jax.pmap(lambda _, state: state, in_axes=(0, None), devices=devices)(
        np.zeros(len(devices)), state
    )


def unreplicate(tree: Any) -> Any:
    """Returns the first device's copy of a tree that `pmap_step` made."""
    return jax.tree.map(lambda x: x[0], tree)


def share_rows(batch: Batch, num_devices: int) -> Batch:
    """Returns a host batch for `pmap_step`, (B, ...) as (devices, B / devices, ...)."""
    return jax.tree.map(
        lambda x: np.reshape(x, (num_devices, x.shape[0] // num_devices, *x.shape[1:])), batch
    )


def check_batch_size(batch_size: int, micro_batches: int, num_shards: int) -> None:
    """Raises a ValueError if a batch does not divide into micro-batches and over devices."""
    if batch_size % (micro_batches * num_shards):
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {micro_batches} micro-batches over "
            f"{num_shards} devices: choose a multiple of {micro_batches * num_shards}"
        )


def check_batch(batch: Batch, vocab_size: int, is_whole: bool = True) -> None:
    """Refuses, on the host, a batch that would train on nothing or on other tokens than it says.

    Args:
      batch: on the host.
      vocab_size: of the model.
      is_whole: whether these are all rows of the global batch; a part may weigh nothing.

    Raises:
      ValueError: if all weights are 0, or an id lies outside the vocabulary (jax would clamp it).
    """
    if is_whole and not np.any(batch.weights):
        raise ValueError(
            "every weight of a batch is 0, so that there is nothing to learn from it: check the "
            "loss mask of the data"
        )
    for name in ("tokens", "targets", "source"):
        ids = getattr(batch, name)
        if ids is not None and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"{name} of a batch lie in {ids.min()}..{ids.max()}, outside of the model's "
                f"vocabulary 0..{vocab_size - 1}: use the tokenizer the model was made for"
            )
