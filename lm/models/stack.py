"""The residual stream: a pattern of blocks, scanned as one step and repeated."""

import math

import flax.linen as nn
import jax

from lm.core.context import Context
from lm.core.mesh import BATCH_AXES, num_stages, target_platform
from lm.core.part import Part
from lm.layers.attention import indices
from lm.layers.block import gathered, stream
from lm.layers.cache import places
from lm.layers.projection import PRODUCT
from lm.models.pipeline import pipelined

Array = jax.Array

# By name, what the backward pass finds again of each repeat besides its input: everything, the
# products of projections, nothing, or those products from the host's memory.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
# XLA's CPU backend runs a scanned stack about 1.5 times slower than the same stack unrolled; an
# accelerator does not, and compiles it in a fraction of the time.
MAX_UNROLL_ON_CPU = 32


class Blocks(Part):
    """Blocks that run one after the other; their state is the tuple of theirs."""

    blocks: tuple[nn.Module, ...] = ()

    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        states = []
        for index, block in enumerate(self.blocks):
            x_BTD, new = block(x_BTD, ctx, None if state is None else state[index])
            states.append(new)
        return x_BTD, tuple(states)


class Stack(Part):
    """entry -> prefix -> pattern, `repeats` times -> suffix -> norm.

    The parameters of the pattern are stacked over a leading dimension of `repeats`, however the
    repeats are computed: one scan, several at a time, unrolled (`ctx.unroll`), or as a pipeline
    where the current mesh has several stages (`ctx.pipeline`).

    Attributes:
      pattern: blocks of one repeat, in order.
      repeats: number of repeats; the depth is `repeats * len(pattern)` plus prefix and suffix.
      entry: what embedded tokens meet first (`Entry`), or None.
      norm: applied last, or None.
      bias: relative bias computed once and shared by all blocks through `ctx`, or None.
      prefix, suffix: blocks outside of the scan.

    A tuple of blocks becomes a `Blocks`.
    """

    pattern: tuple[nn.Module, ...] | Blocks
    repeats: int
    entry: nn.Module | None = None
    norm: nn.Module | None = None
    bias: nn.Module | None = None
    prefix: tuple[nn.Module, ...] | Blocks = ()
    suffix: tuple[nn.Module, ...] | Blocks = ()

    def __post_init__(self) -> None:
        for name in ("pattern", "prefix", "suffix"):
            blocks = getattr(self, name)
            if isinstance(blocks, tuple):
                object.__setattr__(self, name, Blocks(blocks))
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BTD: Array, ctx: Context, state=None):
        """Returns (B, T, D) and the new decoding state {'prefix', 'pattern', 'suffix'} or None."""
        if self.entry is not None:
            x_BTD = self.entry(x_BTD, ctx)
        x_BTD = stream(x_BTD, ctx)
        if self.bias is not None:
            index_T = indices(ctx, x_BTD.shape[1])
            index_S = index_T
            if ctx.slot is not None:
                index_S = places(index_T[-1] + 1, ctx.segments_BS.shape[1])
            ctx = ctx.replace(bias_NTS=self.bias(index_T, index_S))
        old = state or dict.fromkeys(("prefix", "pattern", "suffix"))
        new = {}
        x_BTD, new["prefix"] = self.prefix(x_BTD, ctx, old["prefix"])
        x_BTD, new["pattern"] = self.repeat(x_BTD, ctx, old["pattern"])
        x_BTD, new["suffix"] = self.suffix(x_BTD, ctx, old["suffix"])
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        keeps_state = state is not None or ctx.cache_length is not None
        return gathered(x_BTD, ctx), new if keeps_state else None

    def repeat(self, x_BTD: Array, ctx: Context, state):
        params = self.variables.get("params", {}).get("pattern")
        if any(map(_is_tuple, jax.tree.leaves(params, is_leaf=_is_tuple))):
            return self.one_by_one(params, x_BTD, ctx, state)
        if num_stages() > 1 and not self.is_initializing():
            return self.over_stages(params, x_BTD, ctx, state), None

        def step(pattern, x_BTD, state):
            x_BTD, state = pattern(x_BTD, ctx, state)
            return stream(x_BTD, ctx), state

        unroll = ctx.unroll
        if unroll is None:
            few = target_platform() == "cpu" and self.repeats <= MAX_UNROLL_ON_CPU
            # Unrolled, XLA's CPU backend shares what remat computes again with the forward pass.
            unroll = self.repeats if few and ctx.remat == "none" else 1
        if ctx.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is one of {', '.join(REMAT_POLICIES)}, not {ctx.remat!r}")
        if ctx.remat != "none":
            step = nn.remat(step, policy=REMAT_POLICIES[ctx.remat], prevent_cse=unroll > 1)
        scan = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.repeats,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.pattern, x_BTD, state)

    def over_stages(self, params, x_BTD: Array, ctx: Context, state) -> Array:
        """Runs the repeats as a pipeline over the mesh's stages.

        Raises:
          ValueError: for decoding, for blocks outside of the repeats, and for repeats or rows that
            do not divide.
        """
        if state is not None or ctx.cache_length is not None:
            raise ValueError(
                "a pipeline is for training: decode without a mesh, or on one whose stage is 1"
            )
        if self.prefix.blocks or self.suffix.blocks:
            raise ValueError(
                f"this stack has {len(self.prefix.blocks) + len(self.suffix.blocks)} blocks before "
                "or after its repeats, and stages share equal ones: leave the mesh's stage at 1"
            )
        shape = jax.sharding.get_abstract_mesh().shape
        shards = math.prod(shape[axis] for axis in BATCH_AXES)
        schedule = ctx.pipeline.over(num_stages(), len(x_BTD), shards)
        runs = schedule.stages * schedule.chunks
        if self.repeats % runs:
            raise ValueError(
                f"{self.repeats} repeats of the stack do not divide over {schedule.stages} stages "
                f"of {schedule.chunks} chunks: choose another mesh or train.pipeline.chunks"
            )
        chunk = Stack(self.pattern.clone(parent=None), self.repeats // runs)

        def layers(params, x_BTD: Array, ctx: Context, key: Array | None) -> Array:
            rngs = {} if key is None else {"dropout": key}
            return chunk.apply({"params": {"pattern": params}}, x_BTD, ctx, rngs=rngs)[0]

        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return pipelined(layers, params, x_BTD, ctx, schedule, key)

    def one_by_one(self, params, x_BTD: Array, ctx: Context, state):
        """Runs the repeats with parameters and state that lie apart; there is no gradient."""
        pattern, states = self.pattern.clone(parent=None), []
        for index in range(self.repeats):
            own, old = (
                jax.tree.map(lambda leaf: leaf[index], tree, is_leaf=_is_tuple)  # noqa: B023
                for tree in (params, state)
            )
            x_BTD, new = pattern.apply({"params": own}, x_BTD, ctx, old)
            states.append(new)
        return x_BTD, jax.tree.map(lambda *leaves: leaves, *states)


def apart(tree):
    """Returns parameters or a decoding state with a tuple of arrays for each that repeats stack.

    On a CPU a loop that decodes is faster with it: a layer's kernels are operands as they lie, and
    its cache is written in place, where a stack would be cut and put together again at every step.
    Elsewhere, and for many repeats, it returns the tree as it is.
    """
    if target_platform() != "cpu":
        return tree

    def cut(path, leaf):
        stacked = any(getattr(key, "key", None) == "pattern" for key in path)
        if not stacked or _is_tuple(leaf) or len(leaf) > MAX_UNROLL_ON_CPU:
            return leaf
        return tuple(leaf[index] for index in range(len(leaf)))

    # A pattern's own state is a tuple too, of dicts.
    return jax.tree_util.tree_map_with_path(cut, tree, is_leaf=_is_tuple)


def _is_tuple(tree) -> bool:
    """Whether this is a tuple of arrays, which stands for a stack of them."""
    return isinstance(tree, tuple) and len(tree) > 0 and hasattr(tree[0], "shape")
