"""Collectives read from compiled programs: written by hand, and compiled here."""

# ruff: noqa: E501
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lm.core.mesh import MeshShape, make_mesh
from lm.train.hlo import Collective, collectives

LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (arg: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %arg = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[16,4]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %all-to-all.1 = f32[16,4]{1,0:T(8,128)} all-to-all(%x), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %t = (s32[], /*index=1*/f32[16,4]{1,0}) tuple(%i, %all-to-all.1)
}

%inner_cond (arg.1: (s32[], f32[16,4])) -> pred[] {
  %arg.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %constant.7 = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %constant.7), direction=LT
}

%body (arg.2: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %arg.2 = (s32[], f32[16,4]{1,0}) parameter(0)
  %x.2 = f32[16,4]{1,0} get-tuple-element(%arg.2), index=1
  %all-reduce.1 = f32[16,4]{1,0} all-reduce(%x.2), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %t.2 = (s32[], f32[16,4]{1,0}) tuple(%i, %all-reduce.1)
  ROOT %while.1 = (s32[], f32[16,4]{1,0}) while(%t.2), condition=%inner_cond, body=%inner_body
}

%cond (arg.3: (s32[], f32[16,4])) -> pred[] {
  %arg.3 = (s32[], f32[16,4]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%all-reduce-scatter.2 (p: bf16[8,6]) -> bf16[1,6] {
  %p = bf16[8,6]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[8,6]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=4, replica_groups={}, to_apply=%add
  ROOT %cut = bf16[1,6]{1,0} dynamic-slice(%all-reduce.2, %i, %z), dynamic_slice_sizes={1,6}
}

%async_fusion.1 (p.1: bf16[4,6]) -> bf16[8,6] {
  %p.1 = bf16[4,6]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[8,6]{1,0} all-gather(%p.1), channel_id=11, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%async_fusion.2 (p.2: bf16[4,6]) -> bf16[8,6] {
  %p.2 = bf16[4,6]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,6]{1,0} all-gather(%p.2), channel_id=11, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

ENTRY %main (x: f32[16,4], y: bf16[8,6]) -> f32[16,4] {
  %y = bf16[8,6]{1,0} parameter(1)
  %fusion = bf16[1,6]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.2
  %start = bf16[8,6]{1,0} fusion(%p.9), kind=kCustom, calls=%async_fusion.1
  %done = bf16[8,6]{1,0} fusion(%start), kind=kCustom, calls=%async_fusion.2
  %all-gather-start.1 = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%z), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done.1 = f32[16,4]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute-start = (f32[16,4]{1,0}, f32[16,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %while.2 = (s32[], f32[16,4]{1,0}) while(%t.9), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
}
"""


def test_a_program_written_by_hand():
    """A loop of 5 rounds holds one of 3, whose number stands in its condition alone.

    Two fusions, by their channel, are halves of one collective.
    """
    whole = 16 * 4 * 4
    assert collectives(LOOP) == (
        Collective("all-gather", 2, whole * 7 / 8 + 8 * 6 * 2 / 2),
        Collective("reduce-scatter", 1, 8 * 6 * 2 * 7 / 8),
        Collective("all-reduce", 5, 5 * 2 * whole * 3 / 4),
        Collective("all-to-all", 15, 15 * whole / 2),
        Collective("collective-permute", 1, whole),
    )


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['axis_0'=8] {'axis_0'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
    ],
)
def test_groups_in_every_spelling(groups, size):
    text = LOOP.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    found = {each.kind: each.bytes for each in collectives(text)}
    expected = 5 * 2 * (16 * 4 * 4) * (size - 1) / size
    assert found["all-reduce"] == pytest.approx(expected, rel=1e-12)


def test_a_loop_of_unknown_length_counts_once():
    text = LOOP.replace('"known_trip_count":{"n":"5"},', "")
    assert {c.kind: c.count for c in collectives(text)}["all-reduce"] == 1


def test_refuses_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule jit_step\n")


def shift(x, axis):
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % 8) for i in range(8)])


# What each device gives to a collective is (8, 16) of fp32.
GIVEN = 8 * 16 * 4


@pytest.mark.parametrize(
    "function, kind, sent",
    [
        (jax.lax.psum, "all-reduce", 2 * GIVEN * 7 / 8),
        (partial(jax.lax.all_gather, tiled=True), "all-gather", GIVEN * 7),
        (partial(jax.lax.psum_scatter, tiled=True), "reduce-scatter", GIVEN * 7 / 8),
        (
            partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
            "all-to-all",
            GIVEN * 7 / 8,
        ),
        (shift, "collective-permute", GIVEN),
    ],
)
@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_compiled_collectives_are_those_that_were_asked_for(function, kind, sent, rounds):
    """Eight devices, and a loop whose rounds depend on each other."""
    mesh = make_mesh(MeshShape(data=8))

    def local(x):
        def one(x, _):
            y = function(jnp.sin(x), "data")
            return x + y.sum(), None

        return jax.lax.scan(one, x, length=rounds)[0]

    spec = PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    found = collectives(jax.jit(mapped).lower(x).compile().as_text())
    assert found == (Collective(kind, rounds, rounds * sent),)
