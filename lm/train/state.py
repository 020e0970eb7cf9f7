"""What a train step reads and writes, and where it lives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from lm.core.context import Context
from lm.core.mesh import (
    VOCAB,
    check_all_axes_divide,
    padded_shape,
    param_sharding,
    replicated,
)
from lm.core.paths import flatten, map_with_path, partition, unflatten
from lm.core.pipeline import GPIPE, Pipeline
from lm.models import adapters, quantized
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.kernels import kernels
from lm.ops.quantize import KINDS
from lm.train.objectives import Objective
from lm.train.optimizer import Axes, Optimizer
from lm.train.trainable import FULL, Table, make_transform, trained_paths

Params = Mapping[str, Any]
# The memory of a device's host that the device reads and writes by itself.
HOST = "pinned_host"


@struct.dataclass
class TrainState:
    """Everything that changes as training goes on.

    Attributes:
      step: () int32, number of updates made.
      params: all parameters; the trained ones are fp32.
      opt_state: of the trained parameters alone.
      rng: (2,) uint32, the key of the run; it never changes, a step folds its number in.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


@dataclass(frozen=True)
class Recipe:
    """What a train step depends on besides its state and batch; hashable, static under jit.

    Attributes:
      model: a model value.
      objective: what is minimised.
      optimizer: with a schedule that has a length.
      trainable: the table of what trains.
      micro_batches: number of parts that a batch is computed in, one after the other.
      dtype: compute dtype, 'float32' or 'bfloat16'; parameters are fp32 in any case.
      remat: what the backward pass computes again: 'none', 'dots', 'full' or 'offload'.
      attention: its backend; 'auto' leaves it to `lm.ops.attention.choose`.
      context_parallel, sequence_parallel: as of `TrainConfig`.
      pipeline: how rows pass through layers that lie on several stages.
      adapter: put beside the model's kernels before the first step, or None.
      frozen_dtype: what parameters that do not train are stored in, 'float32' or 'bfloat16'; or
        the kind that kernels of projections which do not train are quantized as, 'int8', 'int4' or
        'nf4' (`lm.ops.quantize`), while the others stay fp32.
      offload_optimizer: whether the optimizer's moments lie in the host's memory between steps.
    """

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    trainable: Table = FULL
    micro_batches: int = 1
    dtype: str = "float32"
    remat: str = "none"
    adapter: LoRA | None = None
    frozen_dtype: str = "float32"
    attention: str = "auto"
    context_parallel: str = "ulysses"
    pipeline: Pipeline = GPIPE
    offload_optimizer: bool = False
    sequence_parallel: bool = False

    def context(self, deterministic: bool = False) -> Context:
        """Returns the context of a training call, or of an evaluation (deterministic)."""
        return Context(
            deterministic=deterministic,
            adapter_dropout=0.0 if self.adapter is None else self.adapter.dropout,
            dtype=self.dtype,
            attention=self.attention,
            context_parallel=self.context_parallel,
            sequence_parallel=self.sequence_parallel,
            remat=self.remat,
            # Unrolled, XLA's CPU backend holds the dequantized kernels of many layers at once.
            unroll=1 if self.frozen_dtype in KINDS else None,
            pipeline=self.pipeline,
        )

    def over(self, num_steps: int) -> "Recipe":
        """Returns the recipe with every schedule as long as the run, if it has no length."""

        def lengthen(optimizer: Optimizer) -> Optimizer:
            return replace(optimizer, learning_rate=optimizer.learning_rate.over(num_steps))

        table = tuple(
            replace(group, optimizer=group.optimizer and lengthen(group.optimizer))
            for group in self.trainable
        )
        return replace(self, optimizer=lengthen(self.optimizer), trainable=table)

    def split(self, params: Params) -> tuple[dict, dict]:
        """Returns the trained and the frozen parameters."""
        trained = trained_paths(self.trainable, params)
        return partition(params, lambda path: path in trained)

    def prepare(self, params: Params, key: jax.Array) -> dict:
        """Returns what training starts from: parameters with the adapter, frozen ones stored low.

        Parameters that hold an adapter already keep it.

        Raises:
          ValueError: if frozen kernels are to be quantized and there are none, or the parameters
            are quantized already.
        """
        if quantized.stored(flatten(params)):
            raise ValueError(
                "the parameters to start from are quantized, and codes of codes would be further "
                "off: start from what they were made of, or lm.models.quantized.dequantize them"
            )

        def with_adapter(params: Params) -> Params:
            if self.adapter is None or any(map(adapters.is_adapter, flatten(params))):
                return params
            return adapters.add(self.model, params, self.adapter, key)

        shapes = jax.eval_shape(with_adapter, params)
        if self.frozen_dtype in KINDS:
            frozen = frozen_kernels(self.model, self.trainable, shapes)
            if not frozen:
                raise ValueError(
                    f"train.frozen_dtype {self.frozen_dtype} is for kernels that do not train, and "
                    "all do: train an adapter (LoRA), or leave it at float32"
                )
            base = quantized.quantize(self.model, params, self.frozen_dtype, frozen)
            # Only now, since a DoRA starts from the lengths of the columns that it will lie beside.
            return dict(with_adapter(base))
        trained = trained_paths(self.trainable, shapes)

        def store(path: str, leaf: Any) -> Any:
            # The scale of an adapter is a constant of its mathematics, not of the base.
            kept = path in trained or adapters.is_adapter(path)
            return leaf if kept else leaf.astype(self.frozen_dtype)

        return map_with_path(store, with_adapter(params))

    def transform(self, params: Params) -> optax.GradientTransformation:
        """Returns the optimizer of the trained parameters."""
        axes = axes_of(self.model)
        return make_transform(self.optimizer, self.trainable, params, axes, self.offload_optimizer)


def frozen_kernels(model: nn.Module, table: Table, params: Params) -> list[str]:
    """Returns the paths of the kernels of projections that do not train.

    Args:
      model: a model value.
      table: what trains; errors as of `lm.train.trainable.assign`.
      params: its parameters, with the adapter if there is one, not quantized; or their shapes.
    """
    trained = trained_paths(table, params)
    return [path for path in kernels(model) if path not in trained]


def is_offloaded(recipe: Recipe, leaf: Any) -> bool:
    """Whether a leaf of the optimizer's state lies in the host's memory: all that is no number."""
    return recipe.offload_optimizer and leaf.ndim > 0


def for_devices(recipe: Recipe, devices: Sequence[Any]) -> Recipe:
    """Returns a recipe as devices can follow it; on a CPU, whose memory is its host's, all stays.

    Raises:
      ValueError: if something is to lie in the host's memory, and they cannot work with that.
    """
    if devices[0].platform == "cpu":
        remat = "dots" if recipe.remat == "offload" else recipe.remat
        return replace(recipe, remat=remat, offload_optimizer=False)
    kinds = [memory.kind for memory in devices[0].addressable_memories()]
    for option, wanted in (
        ("train.offload_optimizer", recipe.offload_optimizer),
        ("train.remat 'offload'", recipe.remat == "offload"),
    ):
        if wanted and HOST not in kinds:
            raise ValueError(
                f"{option} keeps arrays in the memory {HOST!r}, which a {devices[0].device_kind} "
                f"does not have (it has {', '.join(kinds)}): leave it off there"
            )
    return recipe


@cache
def axes_of(model: nn.Module) -> Axes:
    """Returns path -> logical axes of a model's parameters, quantized or not."""
    return quantized.logical_axes(model)


def new_state(recipe: Recipe, params: Params, rng: jax.Array) -> TrainState:
    """Returns the state before the first step, from parameters."""
    trained, _ = recipe.split(params)
    opt_state = recipe.transform(params).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rng)


def fresh_params(model: nn.Module, seed: int) -> Params:
    """Returns the parameters that a run of this seed begins with."""
    init_key, _ = jax.random.split(jax.random.PRNGKey(seed))
    return P.init(model, init_key)


def init_state(recipe: Recipe, seed: int, mesh: Mesh, params: Params | None = None) -> TrainState:
    """Returns the state before the first step, made where it will live.

    Its parameters are the same on every mesh, but for the room in padded vocabularies.

    Args:
      recipe: the run's.
      seed: of the initial parameters and of all that is random later.
      mesh: devices to lay it out on.
      params: parameters to start from instead of fresh ones.
    """

    def make(params: Params | None) -> TrainState:
        init_key, run_key = jax.random.split(jax.random.PRNGKey(seed))
        start = fresh_params(recipe.model, seed) if params is None else params
        state = new_state(recipe, recipe.prepare(start, jax.random.fold_in(init_key, 1)), run_key)
        return pad(recipe, mesh, state)

    shardings = state_shardings(recipe, mesh, jax.eval_shape(make, params))
    return jax.jit(make, out_shardings=shardings)(params)


def abstract_state(recipe: Recipe, mesh: Mesh | None = None) -> TrainState:
    """Returns the shapes and dtypes of the state; takes no memory.

    Args:
      recipe: the run's.
      mesh: that its vocabularies are padded for; None leaves them as they are.
    """

    def make(params: Params) -> TrainState:
        key = jax.random.PRNGKey(0)
        state = new_state(recipe, recipe.prepare(params, key), key)
        return state if mesh is None else pad(recipe, mesh, state)

    return jax.eval_shape(make, P.abstract(recipe.model))


def by_parameter(
    params: Params, tree: Any, function: Callable[[str, Any], Any], otherwise: Any = None
) -> Any:
    """Returns a tree with `function(path, leaf)` for each leaf that belongs to a parameter.

    A leaf belongs to the parameter whose path ends its own and whose rank is its own, as the
    moments of an optimizer do.

    Args:
      params: all parameters, arrays or shapes.
      tree: of arrays or shapes.
      function: of the parameter's path and the leaf.
      otherwise: a function of any other leaf; None keeps it.
    """
    leaves = flatten(params)

    def one(keys, leaf):
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(names)):
            path = "/".join(names[start:])
            if path in leaves and len(leaves[path].shape) == len(leaf.shape):
                return function(path, leaf)
        return leaf if otherwise is None else otherwise(leaf)

    return jax.tree_util.tree_map_with_path(one, tree)


def pad(recipe: Recipe, mesh: Mesh, state: TrainState) -> TrainState:
    """Returns a state with zeros at the end of vocabularies that the mesh does not divide.

    Nothing reads them (`strip`), so that their gradients, moments and values stay 0.
    """
    axes = axes_of(recipe.model)

    def one(path: str, leaf: Any) -> Any:
        shape = padded_shape(mesh, axes.get(path, ()), leaf.shape) if path in axes else leaf.shape
        if shape == leaf.shape:
            return leaf
        return jnp.pad(leaf, [(0, new - old) for new, old in zip(shape, leaf.shape)])

    return state.replace(
        params=by_parameter(state.params, state.params, one),
        opt_state=by_parameter(state.params, state.opt_state, one),
    )


def strip(recipe: Recipe, params: Params, tree: Any) -> Any:
    """Returns a tree of parameters or moments without what `pad` added, as the model reads them."""
    axes, size = axes_of(recipe.model), recipe.model.vocab_size  # pyright: ignore

    def one(path: str, leaf: Any) -> Any:
        if VOCAB not in axes.get(path, ()):
            return leaf
        dim = axes[path].index(VOCAB)
        return leaf if leaf.shape[dim] == size else jax.lax.slice_in_dim(leaf, 0, size, axis=dim)

    return by_parameter(params, tree, one)


def state_shardings(recipe: Recipe, mesh: Mesh, state: TrainState) -> TrainState:
    """Returns the sharding of every leaf of a state (of arrays or of shapes).

    Optimizer moments lie as the parameter they belong to, on its devices or, if they are offloaded,
    in the memory of those devices' hosts.

    Raises:
      ValueError: if a parameter does not divide over the mesh, or an axis divides nothing.
    """
    axes = axes_of(recipe.model)
    leaves = flatten(state.params)
    everywhere = replicated(mesh)
    shardings = {
        path: param_sharding(mesh, axes[path], leaf.shape, path) if path in axes else everywhere
        for path, leaf in leaves.items()
    }
    check_all_axes_divide(mesh, shardings.values())

    def moment(path: str, leaf: Any) -> Any:
        same = leaf.shape == leaves[path].shape
        return in_memory(leaf, shardings[path] if same else everywhere)

    def in_memory(leaf: Any, sharding: Any = everywhere) -> Any:
        return sharding.with_memory_kind(HOST) if is_offloaded(recipe, leaf) else sharding

    return TrainState(
        step=everywhere,
        params=unflatten(shardings),
        opt_state=by_parameter(state.params, state.opt_state, moment, in_memory),
        rng=everywhere,
    )
