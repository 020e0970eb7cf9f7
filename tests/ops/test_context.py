"""Attention whose places lie on several devices against attention on one, and its collectives."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.core.mesh import BATCH_AXES, MeshShape, make_mesh
from lm.ops import flash
from lm.ops.attention import attend, choices
from lm.ops.loss import head_cross_entropy
from lm.ops.mask import Mask
from lm.ops.ring import ring_attend, rounds_of
from lm.ops.sequence import lay_out

WAYS = ("ulysses", "ring")
MESHES = [
    dict(sequence=8),
    dict(sequence=4, data=2),
    dict(sequence=2, fsdp=2, tensor=2),
    dict(sequence=2, tensor=4),
    dict(sequence=2),
    dict(sequence=4, tensor=2),
]


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mesh_of(data=1, **sizes):
    count = data * math.prod(sizes.values())
    return make_mesh(MeshShape(data=data, **sizes), jax.devices()[:count])


def traced_for(mesh, function, *args, **options):
    """Calls a function under a mesh, as the train step does."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(*args, **options)


def ring_in_blocks(*args, block, **options):
    return ring_attend(lay_out(), *args, block=block, **options)


def documents(B, T, rng):
    """Returns (B, T) documents of any lengths, some padding after them and before them."""
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segments[:, T - int(rng.integers(0, T // 3 + 1)) :] = 0
    segments[0, : int(rng.integers(0, T // 3 + 1))] = 0
    return jnp.asarray(segments)


def softmax_by_hand(q, k, v, mask, bias_NTS=None, scale=None, softcap=None, sink_N=None):
    """The definition, on one device: every score, keys repeated for their queries."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_NTS is not None:
        scores += bias_NTS
    scores = jnp.where(mask.allowed()[:, None], scores, -1e30)
    if sink_N is not None:
        sinks = jnp.broadcast_to(sink_N[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    weights = jax.nn.softmax(scores)[..., : k.shape[1]]
    weights = jnp.where(mask.allowed()[:, None], weights, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def agrees(mesh, function, floats, mask, options, tolerance=1e-5):
    """Asserts that a function under a mesh equals the definition, with all gradients."""
    weigh = draw(*floats["q"].shape[:3], floats["v"].shape[-1], seed=9)

    def run(function, floats):
        def total(floats):
            rest = {name: x for name, x in floats.items() if name not in "qkv"}
            out = function(floats["q"], floats["k"], floats["v"], mask, **rest, **options)
            return (out * weigh).sum(), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(floats)
        return {"out": out, **grads}

    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(floats, everywhere)
    found = jax.jit(partial(run, partial(traced_for, mesh, function)))(placed)
    expected = jax.jit(partial(run, softmax_by_hand))(floats)
    assert found.keys() == expected.keys() and len(found["out"].sharding.device_set) == mesh.size
    for name, theirs in expected.items():
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(
            found[name], theirs, atol=tolerance * scale, rtol=0, err_msg=name
        )


# --- equality --------------------------------------------------------------------------------

KINDS = {
    "full": dict(),
    "causal": dict(causal=True),
    "window": dict(causal=True, window=7),
    "both sides": dict(window=5),
    "documents": dict(causal=True, segments=True),
    "prefix": dict(causal=True, prefix=True),
    "bias": dict(bias=True),
    "sinks": dict(causal=True, sink=True),
    "soft-cap": dict(causal=True, softcap=1.5, scale=0.7),
    "all of it": dict(causal=True, window=9, segments=True, bias=True, sink=True, softcap=2.0),
}


def case(kind, B=2, T=24, N=8, K=4, H=8, seed=0):
    """Returns operands, the mask and the options of a kind."""
    rng, settings = np.random.default_rng(seed), dict(KINDS[kind])
    floats = dict(q=draw(B, T, N, H, seed=seed), k=draw(B, T, K, H, seed=seed + 1))
    floats["v"] = draw(B, T, K, H, seed=seed + 2)
    if settings.pop("bias", False):
        floats["bias_NTS"] = draw(N, T, T, seed=seed + 3)
    if settings.pop("sink", False):
        floats["sink_N"] = draw(N, seed=seed + 4)
    fields = {name: settings.pop(name) for name in ("causal", "window") if name in settings}
    if settings.pop("segments", False):
        segments = documents(B, T, rng)
        fields |= dict(segments_BT=segments, segments_BS=segments)
    if settings.pop("prefix", False):
        fields["prefix_B"] = jnp.asarray(rng.integers(1, T, B))
    return floats, Mask(np.arange(T), np.arange(T), **fields), settings


FAST = {("all of it", "ulysses"), ("causal", "ring"), ("all of it", "ring")}


def cells():
    for kind in KINDS:
        for way in WAYS:
            yield (
                (kind, way)
                if (kind, way) in FAST
                else pytest.param(kind, way, marks=[pytest.mark.slow])
            )


@pytest.mark.ledger("P041")
@pytest.mark.parametrize("kind, way", list(cells()))
def test_equals_one_device(kind, way):
    """Every mask, forwards and backwards: places on four devices, and heads on two of each."""
    function = partial(attend, context_parallel=way)
    agrees(mesh_of(sequence=4, tensor=2), function, *case(kind))


@pytest.mark.ledger("P041")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_equals_one_device_on_every_mesh(sizes, way):
    """Two key heads for eight query heads: fewer than the devices that divide the heads."""
    function = partial(attend, context_parallel=way)
    agrees(mesh_of(**sizes), function, *case("all of it", K=2, seed=3))


def random_case(seed):
    """Returns a mesh, and a call of any shape and mask that it divides."""
    rng = np.random.default_rng(seed)
    sizes = MESHES[rng.integers(len(MESHES))]
    places, tensor = sizes["sequence"], sizes.get("tensor", 1)
    B = int(rng.integers(1, 3)) * sizes.get("data", 1) * sizes.get("fsdp", 1)
    K = int(rng.integers(1, 4)) * tensor
    N, H = K * places * int(rng.integers(1, 3)), int(rng.integers(1, 9))
    T = S = places * int(rng.integers(1, 12))
    fields: dict = dict(causal=bool(rng.integers(2)))
    if not fields["causal"] and rng.integers(2):
        S = places * int(rng.integers(1, 12))  # Cross attention.
    if rng.integers(2):
        fields["window"] = int(rng.integers(1, S + 2))
    if fields["causal"] and rng.integers(2):
        fields["prefix_B"] = jnp.asarray(rng.integers(0, S, B))
    if rng.integers(2):
        fields["segments_BS"] = documents(B, S, rng)
        fields["segments_BT"] = fields["segments_BS"] if S == T else documents(B, T, rng)
    floats = dict(q=draw(B, T, N, H, seed=seed), k=draw(B, S, K, H, seed=seed + 1))
    floats["v"] = draw(B, S, K, H, seed=seed + 2)
    options = {}
    if rng.integers(2):
        floats["bias_NTS"] = draw(N, T, S, seed=seed + 3)
    if rng.integers(2):
        floats["sink_N"] = draw(N, seed=seed + 4)
    if rng.integers(2):
        options["softcap"] = float(rng.uniform(0.5, 3))
    return mesh_of(**sizes), floats, Mask(np.arange(T), np.arange(S), **fields), options


@pytest.mark.ledger("P041")
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(20))
def test_equals_one_device_whatever_is_asked(seed, way):
    """Random meshes, shapes, masks and options; the ring's blocks of any size."""
    mesh, *call = random_case(seed)
    function = partial(attend, context_parallel=way)
    if way == "ring":
        block = int(np.random.default_rng(seed).integers(1, 8))
        function = partial(ring_in_blocks, block=block)
    agrees(mesh, function, *call)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_summed_in_float32(way):
    """What goes round a ring in bfloat16 is added up in fp32: the definition's, but for rounding
    of operands, outputs and gradients."""
    floats, mask, options = case("all of it", T=64)
    rounded = {name: x.astype(jnp.bfloat16).astype(jnp.float32) for name, x in floats.items()}

    def function(q, k, v, mask, *, bias_NTS, sink_N, **options):
        low = (x.astype(jnp.bfloat16) for x in (q, k, v))
        options |= dict(bias_NTS=bias_NTS, sink_N=sink_N, context_parallel=way)
        out = attend(*low, mask, **options)
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32)

    agrees(mesh_of(sequence=8), function, rounded, mask, options, tolerance=2e-2)


def test_ulysses_leaves_attention_to_the_backend():
    """Whole rows of 256 places are for blocks, and a name is taken at its word."""
    mesh = mesh_of(sequence=4)
    x = jax.ShapeDtypeStruct((1, 256, 4, 8), jnp.float32)
    mask = Mask(np.arange(256), np.arange(256), causal=True)
    with choices() as found:
        for options in (dict(), dict(backend="reference"), dict(context_parallel="ring")):
            call = partial(traced_for, mesh, attend, mask=mask, **options)
            jax.eval_shape(lambda q, call=call: call(q, q, q), x)
    assert [tuple(choice) for choice in found] == [
        ("flash", "causal, ulysses over 4 devices", ""),
        ("reference", "causal, ulysses over 4 devices", ""),
        ("ring", "causal, over 4 devices", ""),
    ]


# --- what is sent, and what is held ----------------------------------------------------------

NUM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
COLLECTIVE = re.compile(
    r" = (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def collectives(text):
    """Yields the kind of every collective of a compiled program, and the bytes a device gets."""
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [NUM_BYTES[t] * math.prod(map(int, s.split(","))) for t, s in shapes if s]
            yield match[2], sum(sizes)


def compiled(way, T, devices, N=8, K=8, H=4, **fields):
    """Returns the program of a forward and backward pass, for rows whose places are divided."""
    mesh = mesh_of(sequence=devices)
    lie = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))
    q, k = (jax.ShapeDtypeStruct((2, T, n, H), jnp.float32, sharding=lie) for n in (N, K))
    mask = Mask(np.arange(T), np.arange(T), **fields)

    def both(q, k, v, grad):
        call = partial(traced_for, mesh, attend, mask=mask, context_parallel=way)
        out, pull = jax.vjp(lambda *args: call(*args), q, k, v)
        return out, *pull(grad)

    return jax.jit(both, out_shardings=(lie,) * 4).lower(q, k, k, q).compile()


@pytest.mark.ledger("P041")
@pytest.mark.perf
def test_ulysses_sends_as_much_when_length_and_devices_double():
    """Nothing but all-to-alls: four there, four back, each of a device's own share of q, k, v."""
    for length, devices in [(16, 2), (32, 4), (64, 8)]:
        found = list(collectives(compiled("ulysses", length, devices, causal=True).as_text()))
        assert found == [("all-to-all", 2 * 8 * 8 * 4 * 4)] * 8, (length, devices)


@pytest.mark.perf
def test_ulysses_repeats_key_heads_no_more_than_it_must():
    """Two key heads on four devices are sent as four, and those of eight as they are."""
    for K, sent in [(2, 4), (4, 4), (8, 8)]:
        found = list(collectives(compiled("ulysses", 16, 4, K=K).as_text()))
        of_keys, of_queries = 2 * 4 * 4 * 4 * sent, 2 * 4 * 4 * 4 * 8
        assert sorted(found) == sorted(
            [("all-to-all", of_keys)] * 4 + [("all-to-all", of_queries)] * 4
        )


@pytest.mark.perf
def test_a_ring_gathers_no_keys():
    """Its only collectives are permutes, none larger than the keys of one device."""
    found = list(collectives(compiled("ring", 64, 4, K=2, causal=True).as_text()))
    assert {kind for kind, _ in found} == {"collective-permute"}
    assert max(size for _, size in found) == 2 * 16 * 2 * 4 * 4


@pytest.mark.perf
@pytest.mark.slow
def test_a_ring_has_temporaries_linear_in_the_length():
    """By the compiler's own count: twice the length, twice the memory; the same with devices."""
    length = 512

    def temporaries(length, devices=2):
        program = compiled("ring", length, devices, N=2, K=2, causal=True)
        return program.memory_analysis().temp_size_in_bytes

    one, two, four = (temporaries(n * length) for n in (1, 2, 4))
    assert two - one > 0
    np.testing.assert_allclose(four - two, 2 * (two - one), rtol=0.03)
    np.testing.assert_allclose(temporaries(2 * length, 4), one, rtol=0.03)


@pytest.mark.parametrize("seed", range(12))
def test_a_ring_ends_where_no_mask_reaches(seed):
    """As many rounds as the furthest device that a query really sees, by a loop over all scores."""
    rng = np.random.default_rng(seed)
    devices, T, S = int(rng.integers(2, 9)), *(int(n) for n in rng.integers(1, 9, 2))
    fields = dict(causal=bool(rng.integers(2)), window=[None, *range(1, 30)][rng.integers(30)])
    if fields["causal"]:
        S = T
    mask = Mask(np.arange(devices * T), np.arange(devices * S), **fields)
    t, s = np.nonzero(np.asarray(mask.allowed()[0]))
    assert rounds_of(mask, devices) == 1 + max((t // T - s // S) % devices)


@pytest.mark.perf
@pytest.mark.slow
def test_a_ring_skips_what_a_mask_hides(monkeypatch):
    """Blocks of scores really computed, on all devices together: those of one device's flash."""
    counted = []
    scores = flash._scores

    def count(*args):
        jax.debug.callback(lambda: counted.append(1))
        return scores(*args)

    monkeypatch.setattr(flash, "_scores", count)
    mesh = mesh_of(sequence=4)
    x = jax.device_put(draw(1, 64, 1, 4), NamedSharding(mesh, PartitionSpec()))
    for fields, blocks in [
        (dict(), 64),
        (dict(causal=True), 36),
        (dict(causal=True, window=9), 15),
    ]:
        counted.clear()
        mask = Mask(np.arange(64), np.arange(64), **fields)
        call = partial(traced_for, mesh, ring_in_blocks, mask=mask, block=8)
        jax.block_until_ready(jax.jit(jax.grad(lambda x, call=call: call(x, x, x).sum()))(x))
        jax.effects_barrier()
        assert len(counted) == 2 * blocks, fields


def test_the_chunks_of_a_loss_stay_on_their_devices():
    """The same sums and gradients as on one device; no hidden state is sent anywhere."""
    mesh, V = mesh_of(data=2, sequence=4), 32
    lie = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))
    x, kernel = draw(4, 24, 16), draw(16, V, seed=1)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, V, (4, 24)))
    weights = (draw(4, 24, seed=3) > 0).astype(jnp.float32)

    def loss(x, kernel, targets, weights, chunk_bytes):
        def total(x, kernel):
            sums = head_cross_entropy(
                lambda x: x @ kernel, x, targets, weights, V, chunk_bytes=chunk_bytes
            )
            return sums.loss, sums

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, kernel)

    # Of the six places of a device four are at a time in a chunk: the last one is padded.
    divided = partial(traced_for, mesh, partial(loss, chunk_bytes=4 * 4 * V * 2))
    args = [jax.device_put(a, lie) for a in (x, targets, weights)]
    args.insert(1, jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())))
    found = jax.jit(divided)
    expected = jax.jit(partial(loss, chunk_bytes=1 << 30))(x, kernel, targets, weights)
    for ours, theirs in zip(jax.tree.leaves(found(*args)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    text = found.lower(*args).compile().as_text()
    assert " while(" in text
    assert {kind for kind, _ in collectives(text)} == {"all-reduce"}
    assert max(size for _, size in collectives(text)) <= kernel.nbytes + 4 * 8


# --- refusals --------------------------------------------------------------------------------


def shapes(T=16, S=None, N=4, K=4, B=2):
    q = jax.ShapeDtypeStruct((B, T, N, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((B, S or T, K, 8), jnp.float32)
    return q, k, k, Mask(np.arange(T), np.arange(S or T))


REFUSED = [
    (dict(sequence=8), dict(T=12), {}, "rows of 12 places do not divide over .* sequence=8"),
    (dict(sequence=8), dict(S=20), {}, "rows of 20 places do not divide over .* sequence=8"),
    (dict(sequence=8), dict(), {}, "sequence=8 devices do not divide 4 heads: choose .*'ring'"),
    (dict(sequence=2, tensor=4), dict(), {}, "tensor=4 times sequence=2 devices do not divide 4 h"),
    (dict(sequence=2, data=4), dict(), {}, "4 devices do not divide 2 rows"),
    (dict(sequence=2, tensor=4), dict(N=6, K=3), {}, "4 not 6 heads"),
    (dict(sequence=2, tensor=4), dict(N=12, K=3), {}, "take several of 3 key heads each"),
    (dict(sequence=2), dict(), dict(context_parallel="rings"), "ulysses, ring, not 'rings'"),
    (
        dict(sequence=2),
        dict(),
        dict(context_parallel="ring", backend="splash"),
        "computes the scores itself, and not by 'splash'",
    ),
]


@pytest.mark.parametrize("sizes, call, options, words", REFUSED)
def test_what_a_mesh_does_not_divide_is_refused(sizes, call, options, words):
    q, k, v, mask = shapes(**call)
    with pytest.raises(ValueError, match=words):
        attend_for = partial(traced_for, mesh_of(**sizes), attend, mask=mask, **options)
        jax.eval_shape(lambda *args: attend_for(*args), q, k, v)


def test_a_cache_is_refused():
    def decode(q, index):
        return traced_for(mesh_of(sequence=2), attend, q, q, q, Mask(index, index))

    index = jax.ShapeDtypeStruct((16,), jnp.int32)
    with pytest.raises(ValueError, match="these keys are of a cache"):
        jax.eval_shape(decode, shapes()[0], index)
