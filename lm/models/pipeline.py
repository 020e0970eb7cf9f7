"""Layers that lie on several stages, computed as a pipeline inside of one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.batch import split_rows
from lm.core.context import Context
from lm.core.mesh import BATCH_AXES
from lm.core.pipeline import Schedule

Array = jax.Array
STAGE = "stage"
Layers = Callable[[Any, Array, Context, Array | None], Array]


def pipelined(
    layers: Layers, params: Any, x_BTD: Array, ctx: Context, schedule: Schedule, key: Array | None
) -> Array:
    """Returns what all layers make of `x_BTD`, each stage of the mesh computing its own.

    One scan over the ticks of the schedule runs on every stage, and after each tick its output goes
    to the next stage. Over the mesh's other axes the compiler divides the layers as ever. The
    gradient is that of the scan: the ticks in reverse, so that the activations of all micro-batches
    are held until then, or with remat the inputs of their chunks.

    A stage that has nothing to do computes something that nobody reads. With several chunks the
    parameters, which lie in the order of layers, are sent to their stages in every call.

    Args:
      layers: of a chunk's parameters, its (b, T, D) input, the context of its rows and a key.
      params: tree of (L, ...), L a multiple of stages x chunks.
      x_BTD: B a multiple of the micro-batches.
      ctx: what is an array in it belongs to rows, but for the bias on scores.
      schedule: for the current mesh.
      key: of dropout, folded with the number of the micro-batch and of the run of layers; or None.
    """
    stages, parts = schedule.stages, schedule.micro_batches
    mesh = jax.sharding.get_abstract_mesh()
    where = NamedSharding(mesh, PartitionSpec(STAGE, None, BATCH_AXES))

    def by_chunk(leaf: Array) -> Array:
        leaf = leaf.reshape(schedule.chunks, stages, -1, *leaf.shape[1:])
        return leaf.swapaxes(0, 1)

    def everywhere(x: Array) -> Array:
        # A copy for each stage is no more than one that all share. Its gradient is summed outside
        # of the stages, where the compiler chooses how.
        return jnp.broadcast_to(x, (stages, *x.shape))

    def by_part(x_B: Array) -> Array:
        return jax.lax.with_sharding_constraint(everywhere(split_rows(x_B, parts)), where)

    def run(stage, params, x, rows, bias, key):
        stage, params, x_MBTD, rows, bias = jax.tree.map(
            lambda leaf: leaf[0], (stage, params, x, rows, bias)
        )

        def tick(carry, now):
            x_BTD, done_MBTD = carry
            busy, part, chunk = schedule.job(now, stage)
            part = jnp.clip(part, 0, parts - 1)
            own, of_part = (
                jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: B023
                for index, tree in ((chunk, params), (part, rows))
            )
            x_BTD = jnp.where((stage == 0) & (chunk == 0), x_MBTD[part], x_BTD)
            own_key = None
            if key is not None:
                own_key = jax.random.fold_in(jax.random.fold_in(key, part), chunk * stages + stage)
            y_BTD = layers(own, x_BTD, of_part.replace(bias_NTS=bias), own_key)
            is_last = busy & (stage == stages - 1) & (chunk == schedule.chunks - 1)
            done_MBTD = done_MBTD.at[part].set(jnp.where(is_last, y_BTD, done_MBTD[part]))
            ring = [(here, (here + 1) % stages) for here in range(stages)]
            return (jax.lax.ppermute(y_BTD, STAGE, ring), done_MBTD), None

        start = jnp.zeros_like(x_MBTD[0]), jnp.zeros_like(x_MBTD)
        (_, done_MBTD), _ = jax.lax.scan(tick, start, jnp.arange(schedule.num_ticks))
        return done_MBTD[None]

    each = PartitionSpec(STAGE)
    done = jax.shard_map(
        run,
        in_specs=(*[each] * 5, PartitionSpec()),
        out_specs=each,
        axis_names={STAGE},
        # Layers hold loops whose first values are the same on all stages, and are not declared so.
        check_vma=False,
    )(
        jnp.arange(stages),
        jax.tree.map(by_chunk, params),
        by_part(x_BTD),
        jax.tree.map(by_part, ctx.replace(bias_NTS=None)),
        jax.tree.map(everywhere, ctx.bias_NTS),
        key,
    )
    return done[-1].swapaxes(0, 1).reshape(x_BTD.shape)
