"""Every backend of attention against the reference, and what each of them refuses."""

import math
import os
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.mesh import MeshShape, make_mesh
from lm.ops import attention, cudnn, splash
from lm.ops.attention import attend, choices, choose
from lm.ops.cudnn import cudnn_attend
from lm.ops.flash import flash_attend
from lm.ops.mask import Mask
from lm.ops.splash import splash_attend


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def documents(B, T, seed):
    """Returns (B, T) documents of any lengths, some padding after them and before them."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segments[:, T - int(rng.integers(0, T // 3 + 1)) :] = 0
    segments[0, : int(rng.integers(0, T // 3 + 1))] = 0
    return jnp.asarray(segments)


def one_device():
    """The tests have eight devices, over which nobody says how to divide a kernel."""
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def compare(function, floats, mask, options, tolerance=1e-5):
    """Asserts that a backend equals the reference, and its gradients, relative to the largest."""
    weigh = draw(*floats["q"].shape[:3], floats["v"].shape[-1], seed=9)

    def total(function, floats):
        rest = {name: x for name, x in floats.items() if name not in "qkv"}
        out = function(floats["q"], floats["k"], floats["v"], mask, **rest, **options)
        return (out.astype(jnp.float32) * weigh).sum(), out

    @jax.jit
    def both(floats):
        pair = (function, attention.reference_attend)
        return [jax.value_and_grad(lambda f, x=x: total(x, f), has_aux=True)(floats) for x in pair]

    ours, theirs = ({"out": out, **grads} for (_, out), grads in both(floats))
    for name, expected in theirs.items():
        found, expected = (np.asarray(x, np.float32) for x in (ours[name], expected))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0, err_msg=name)


def random_case(seed):
    """Returns operands of any shapes, with any mask and options, and a size of blocks."""
    rng = np.random.default_rng(seed)
    B, K, G, H = (int(rng.integers(1, n)) for n in (3, 3, 4, 9))
    T = S = int(rng.integers(2, 40))
    causal, kind = bool(rng.integers(2)), int(rng.integers(3))
    index_T = np.arange(T)
    if kind == 1:  # The newest queries of a cache.
        T = int(rng.integers(1, S + 1))
        index_T = jnp.arange(T) + S - T
    floats = dict(q=draw(B, T, K * G, H, seed=seed), k=draw(B, S, K, H, seed=seed + 1))
    floats["v"] = draw(B, S, K, H, seed=seed + 2)
    fields: dict = dict(causal=causal)
    if rng.integers(2):
        fields["window"] = int(rng.integers(1, S + 2))
    if causal and rng.integers(2):
        fields["prefix_B"] = jnp.asarray(rng.integers(0, S, B))
    if rng.integers(2):
        segments_BS = documents(B, S, seed)
        fields |= dict(segments_BT=segments_BS[:, S - T :], segments_BS=segments_BS)
    options = {}
    if rng.integers(2):
        floats["bias_NTS"] = draw(K * G, T, S, seed=seed + 3)
    if rng.integers(2):
        floats["sink_N"] = draw(K * G, seed=seed + 4)
    if rng.integers(2):
        options["softcap"] = float(rng.uniform(0.5, 3))
    return floats, Mask(index_T, np.arange(S), **fields), options, int(rng.integers(1, S + 3))


SEEDS = [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_flash_agrees_whatever_is_asked(seed):
    """Random shapes, blocks, masks and options together, forwards and backwards."""
    floats, mask, options, block = random_case(seed)
    compare(partial(flash_attend, block=block), floats, mask, options)


SPLASH = {
    "documents": dict(causal=True, segments=True, T=131, softcap=1.5, sink=True, scale=0.3),
    "full": dict(T=128),
    "cross": dict(T=100, S=140),
    "causal": dict(causal=True, T=256),
    "window": dict(causal=True, window=40, T=300),
    "both sides": dict(window=40, T=200, segments=True),
    "bfloat16": dict(causal=True, segments=True, T=140, dtype=jnp.bfloat16),
}
SPLASH_CASES = [
    kind if kind == "documents" else pytest.param(kind, marks=pytest.mark.slow) for kind in SPLASH
]


@pytest.mark.parametrize("kind", SPLASH_CASES)
def test_splash_agrees_for_every_mask_that_it_accepts(kind):
    """The kernel is interpreted; 4 heads over 2 key heads, lengths that fill no block."""
    case = dict(SPLASH[kind])
    T, dtype = case.pop("T"), case.pop("dtype", jnp.float32)
    S = case.pop("S", T)
    floats = dict(q=draw(2, T, 4, 16), k=draw(2, S, 2, 16, seed=1), v=draw(2, S, 2, 16, seed=2))
    floats = {name: x.astype(dtype) for name, x in floats.items()}
    if case.pop("sink", False):
        floats["sink_N"] = draw(4, seed=3)
    mask = Mask(np.arange(T), np.arange(S))
    if case.pop("segments", False):
        segments = documents(2, T, 5)
        mask = mask.replace(segments_BT=segments, segments_BS=segments)
    mask = mask.replace(causal=case.pop("causal", False), window=case.pop("window", None))
    rest = {name: x for name, x in floats.items() if name == "sink_N"}
    operands = (floats["q"], floats["k"], floats["v"], mask)
    with one_device():
        assert splash.refusal(*operands, "tpu", **rest, **case) is None
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    compare(partial(splash_attend, interpret=True), floats, mask, case, tolerance)


@pytest.mark.slow
def test_splash_is_divided_over_a_mesh():
    """Rows over two devices and heads over two others give the numbers of one."""
    mesh = make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    floats = dict(q=draw(2, 140, 4, 16), k=draw(2, 140, 2, 16, seed=1), v=draw(2, 140, 2, 16))
    floats["sink_N"] = draw(4, seed=3)
    segments = documents(2, 140, 5)
    mask = Mask(np.arange(140), np.arange(140), segments, segments, causal=True)

    def divided(*args, **options):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return splash_attend(*args, **options, interpret=True)

    with jax.set_mesh(mesh):
        compare(divided, floats, mask, {})


def call(T=256, S=None, heads=(4, 2), H=64, dtype=jnp.bfloat16, segments=False, **fields):
    """Returns the shapes of a call, and its mask."""
    S = S or T
    q, k = (jax.ShapeDtypeStruct((2, L, n, H), dtype) for L, n in zip((T, S), heads))
    if segments:
        ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
        fields |= dict(segments_BT=ids, segments_BS=ids)
    return q, k, k, Mask(np.arange(T), np.arange(S), **fields)


NOTHING = jnp.zeros(0)
CUDNN = [
    (dict(dtype=jnp.float32), {}, "bfloat16 or float16, and this is float32"),
    (dict(H=20), {}, "a multiple of 8 up to 128 wide, and these 20"),
    (dict(H=256), {}, "these 256"),
    (dict(), dict(bias_NTS=NOTHING), "bias"),
    (dict(), dict(softcap=2.0), "soft-cap"),
    (dict(), dict(sink_N=NOTHING), "sinks"),
    (dict(S=300, causal=True), {}, "as many keys as queries, and these are 300 and 256"),
    (dict(T=257, segments=True), {}, "an even number of places, and these are 257"),
]
SPLASHES = [
    (dict(dtype=jnp.float16), {}, "bfloat16 or float32, and this is float16"),
    (dict(), dict(bias_NTS=NOTHING), "bias"),
    (dict(causal=True, prefix_B=NOTHING), {}, "prefixes"),
    (dict(S=300, window=9), {}, "as many keys as queries, and these are 300 and 256"),
]


@pytest.mark.parametrize(
    "backend, platform, shapes, options, words",
    [("cudnn", "gpu", *row) for row in CUDNN] + [("splash", "tpu", *row) for row in SPLASHES],
)
def test_what_a_backend_cannot_honour_is_refused(backend, platform, shapes, options, words):
    """By name and reason where it is asked for; 'auto' takes another, and says why."""
    operands = call(**shapes)
    with one_device():
        with pytest.raises(ValueError, match=f"cannot be computed by '{backend}': .*{words}"):
            choose(backend, *operands, platform=platform, **options)
        choice = choose("auto", *operands, platform=platform, **options)
        assert choice.backend == "flash" and words in choice.instead
        assert choice.instead.startswith(f"{backend}: ")


ACCEPTED = [
    dict(),
    dict(causal=True),
    dict(causal=True, window=9),
    dict(causal=True, window=9, segments=True),
    dict(window=9),
    dict(S=300),
]


@pytest.mark.parametrize("shapes", ACCEPTED)
def test_auto_takes_the_kernel_of_the_platform(shapes):
    operands = call(**shapes)
    for platform, name in [("gpu", "cudnn"), ("tpu", "splash"), ("cpu", "flash")]:
        with one_device():
            assert choose("auto", *operands, platform=platform).backend == name
        assert choose("auto", *call(T=255), platform=platform).backend == "reference"


def test_kernels_refuse_places_that_only_the_program_knows():
    """As those of a cache are, while it is being compiled."""

    def chosen(index):
        q, k, v, _ = call(T=256)
        with one_device():
            for name, platform in [("cudnn", "gpu"), ("splash", "tpu")]:
                with pytest.raises(ValueError, match="keys of a cache"):
                    choose(name, q, k, v, Mask(index, index, causal=True), platform=platform)
        return index

    jax.eval_shape(chosen, jax.ShapeDtypeStruct((256,), jnp.int32))
    operands = call(T=256)
    with one_device(), pytest.raises(ValueError, match="keys of a cache"):
        mask = operands[3].replace(index_T=np.arange(256) + 4)
        choose("cudnn", *operands[:3], mask, platform="gpu")


def test_splash_refuses_devices_that_nothing_divides():
    with pytest.raises(ValueError, match="several devices and no mesh"):
        choose("splash", *call(), platform="tpu")
    mesh = make_mesh(MeshShape(tensor=4), jax.devices()).abstract_mesh
    words = "2 devices do not divide 2 rows, or 4 not 2 heads"
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=words):
        choose("splash", *call(), platform="tpu")


def test_old_gpus_have_no_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "capability", lambda: 7.5)
    with pytest.raises(ValueError, match="and this GPU has 7"):
        choose("cudnn", *call(), platform="gpu")
    monkeypatch.setattr(cudnn, "capability", lambda: 9.0)
    assert choose("auto", *call(H=256), platform="gpu").backend == "cudnn"
    assert choose("auto", *call(H=64), platform="rocm").backend == "flash"


def test_kernels_refuse_another_platform():
    q, k, v, mask = (jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x for x in call())
    for backend, words in [("cudnn", "NVIDIA GPUs"), ("splash", "TPUs")]:
        with pytest.raises(ValueError, match=f"it runs on {words}, and this is a cpu"):
            attend(q, k, v, mask, backend=backend)


def test_choices_are_seen_while_tracing():
    q, k, v, mask = call(T=256, causal=True, window=9, dtype=jnp.float32)
    with choices() as found:
        jax.eval_shape(lambda q, k, v: attend(q, k, v, mask, softcap=2.0), q, k, v)
        jax.eval_shape(lambda q, k, v: attend(q, k, v, mask, backend="reference"), q, k, v)
    assert [tuple(choice) for choice in found] == [
        ("flash", "causal, window 9, soft-cap", ""),
        ("reference", "causal, window 9", ""),
    ]
    assert choices not in attention._watching


LOWERED = [
    dict(causal=True, window=9, segments=True),
    *(
        pytest.param(shapes, marks=pytest.mark.slow)
        for shapes in [*ACCEPTED, dict(causal=True, prefix_B=jnp.array([3, 9]))]
    ),
]


@pytest.mark.parametrize("shapes", LOWERED)
def test_cudnn_is_called_with_the_mask(shapes, monkeypatch):
    """Its program for CUDA has the fused kernel, forwards and backwards, with the mask's name.

    It cannot run here. What it would compute is computed by the same function of jax without
    cuDNN, from the same arguments, and equals the reference.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(
        fused, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    )
    q, k, v, mask = call(T=16, **{**shapes, **({"S": 24} if "S" in shapes else {})})
    ids = documents(2, 16, 3)
    if mask.segments_BS is not None:
        mask = mask.replace(segments_BT=ids, segments_BS=ids)
    assert cudnn.refusal(q, k, v, mask, "gpu") is None

    def loss(q, k, v):
        return cudnn_attend(q, k, v, mask, scale=0.3).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmha" in text and "Backward" in text
    own = cudnn.has_own_mask(mask)
    assert ("ScaleBias" in text) == (not own)
    named = "CAUSAL" if mask.causal and mask.prefix_B is None else "NO_MASK"
    assert named in text
    width = f"sliding_window_length\\22: {mask.window}" if own and mask.window else "window_length"
    assert (width in text) or mask.window is None or not own

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **o: plain(*a, **o)
    )
    floats = dict(q=draw(*q.shape), k=draw(*k.shape, seed=1), v=draw(*k.shape, seed=2))
    compare(cudnn_attend, floats, mask, dict(scale=0.3))


COMPILE_FOR_TPU = """
import jax
from jax.experimental import topologies

from lm.core.batch import Batch
from lm.core.mesh import MeshShape, make_mesh
from lm.models.families.llama import llama
from lm.ops.attention import choices
from lm.train.objectives import Generative
from lm.train.optimizer import AdamW
from lm.train.schedule import Constant
from lm.train.state import Recipe, abstract_state
from lm.train.step import jit_step

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2), chips)
model = llama(
    vocab_size=256, num_features=256, num_heads=4, num_kv_heads=2, num_layers=2, mlp_features=256,
    window=100,
)
recipe = Recipe(model, Generative(), AdamW(Constant(1e-3)), dtype="bfloat16").over(3)
ids = jax.ShapeDtypeStruct((4, 300), "int32")
batch = Batch(ids, ids, jax.ShapeDtypeStruct((4, 300), "float32"), ids, ids)
step, state = jit_step(recipe, mesh), abstract_state(recipe)
with choices() as found:
    lowered = step.lower(state, batch)
print([*dict.fromkeys(found)])
print("kernels:", lowered.compile().as_text().count("tpu_custom_call"))
"""


@pytest.mark.slow
def test_a_step_with_splash_compiles_for_a_tpu():
    """Ahead of time, for four chips of a v5e: rows over two of them and heads over two others."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: pip install libtpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = "[Choice(backend='splash', what='causal, window 100, documents', instead='')]\n"
    # In the loops over the layers: forwards, and backwards for the queries and for the keys.
    assert done.stdout == chosen + "kernels: 3\n"


def arrays_of(jaxpr):
    """Yields the shapes of all that a program computes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars if hasattr(var.aval, "shape"))
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


@pytest.mark.ledger("L36")
@pytest.mark.parametrize("backend", ["reference", "flash", "splash"])
def test_shared_heads_are_never_repeated(backend):
    """No array of a forward and backward pass is as large as the keys of all query heads."""
    T, S, H, N, K = (128, 512, 256, 4, 1) if backend == "splash" else (4, 64, 16, 8, 2)
    mask = Mask(np.arange(T), np.arange(S))
    q, k = (jax.ShapeDtypeStruct((2, L, n, H), jnp.float32) for L, n in ((T, N), (S, K)))
    function = {
        "reference": attention.reference_attend,
        "flash": lambda *args: flash_attend(*args, block=4),
        "splash": splash_attend,
    }[backend]
    loss = jax.grad(lambda q, k, v: function(q, k, v, mask).sum(), (0, 1, 2))
    sizes = [math.prod(shape) for shape in arrays_of(jax.make_jaxpr(loss)(q, k, k).jaxpr)]
    assert max(sizes) < 2 * S * N * H
    repeated = jax.grad(
        lambda q, k, v: function(q, *(x.repeat(N // K, 2) for x in (k, v)), mask).sum(), (0, 1, 2)
    )
    sizes = [math.prod(shape) for shape in arrays_of(jax.make_jaxpr(repeated)(q, k, k).jaxpr)]
    assert max(sizes) >= 2 * S * N * H
