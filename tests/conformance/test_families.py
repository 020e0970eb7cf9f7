"""One table over all families: each test is a column, each family a row.

A cell that does not apply carries its reason in the family's `inapplicable`, and `lm list NAME`
prints it.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.core.context import Context
from lm.core.paths import flatten
from lm.models import params as P
from lm.models.encdec import EncoderDecoder
from lm.models.foreign import read_weights, write_weights
from tests.conformance.harness import (
    FAMILIES,
    B,
    T,
    cells,
    forward,
    grads_of,
    loss_fn,
    random_tokens,
    tiny,
    with_source,
)

COLUMNS = {
    "pure", "export", "scan", "ownership", "decode", "causal", "bidirectional", "padding",
    "packed", "devices", "gradients", "paths", "overfit", "remat",
}  # fmt: skip


def family_column(cell: str):
    assert cell in COLUMNS
    return pytest.mark.parametrize("name", cells(cell))


def test_reasons_name_columns():
    for family in FAMILIES.values():
        assert family.inapplicable.keys() <= COLUMNS | {"resume"}, family.name


@pytest.mark.ledger("D01")
@family_column("pure")
def test_pure(name):
    """apply is a function: same in, same out, and every transformation of jax takes it."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(), tokens)
    first, _ = forward(model, params, tokens, ctx)
    again, _ = forward(model, params, tokens, ctx)
    np.testing.assert_array_equal(first, again)

    def apply(params, tokens, ctx):
        return model.apply({"params": params}, tokens, ctx)[0]

    jaxpr = jax.make_jaxpr(apply)(params, tokens, ctx)
    assert not jaxpr.effects
    assert jax.eval_shape(apply, params, tokens, ctx).shape == (B, T, model.vocab_size)

    def one_row(row, source):
        source = None if source is None else source[None]
        return apply(params, row[None], ctx.replace(source_BS=source))[0]

    mapped = jax.jit(jax.vmap(one_row))(tokens, ctx.source_BS)
    np.testing.assert_allclose(mapped, first, atol=1e-5)
    grads = grads_of(model, params, tokens, ctx)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert hash(model) == hash(FAMILIES[name].build(**FAMILIES[name].tiny))


@family_column("export")
def test_export(name):
    """Foreign tensors come back bit for bit, and so does the config."""
    model, params = tiny(name)
    family = FAMILIES[name]
    tensors = write_weights(family.weights(model), params)
    config = json.loads(json.dumps(family.write_config(model)))
    assert family.read_config(config) == model
    back = read_weights(family.weights(model), tensors, P.abstract(model), family.ignore)
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, params))
    one = sorted(tensors)[0]
    with pytest.raises(ValueError, match=r"nothing maps.*stray"):
        read_weights(family.weights(model), {**tensors, "stray": tensors[one]}, P.abstract(model))
    with pytest.raises(ValueError, match="missing"):
        rest = {k: v for k, v in tensors.items() if k != one}
        read_weights(family.weights(model), rest, P.abstract(model))
    with pytest.raises(ValueError, match="shape"):
        read_weights(family.weights(model), {**tensors, one: tensors[one][:-1]}, P.abstract(model))


@pytest.mark.ledger("D13")
@family_column("scan")
def test_scanned_equals_unrolled(name):
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(), tokens)
    scanned, _ = forward(model, params, tokens, ctx.replace(unroll=1))
    unrolled, _ = forward(model, params, tokens, ctx.replace(unroll=3))
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


@pytest.mark.ledger("D13")
@family_column("remat")
def test_remat_keeps_gradients(name):
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(unroll=1), tokens)
    plain = grads_of(model, params, tokens, ctx)
    for policy in ("dots", "full"):
        remat = grads_of(model, params, tokens, ctx.replace(remat=policy))
        for path, leaf in flatten(plain).items():
            np.testing.assert_allclose(flatten(remat)[path], leaf, atol=1e-6, err_msg=path)


@family_column("ownership")
def test_each_place_owns_its_parameters(name):
    """Doubling the depth adds the same number of parameters again; layers start out different."""
    family = FAMILIES[name]
    depth = family.tiny["num_layers"]
    counts = [
        P.count(family.build(**{**family.tiny, "num_layers": n}))
        for n in (depth, depth + 1, depth + 2)
    ]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
    params = P.init(family.build(**family.tiny), jax.random.key(0))
    for path, leaf in flatten(params).items():
        if "/pattern/" in path:
            assert leaf.shape[0] == depth, path
            if path.endswith("kernel"):
                assert not np.array_equal(leaf[0], leaf[1]), path


@family_column("decode")
@pytest.mark.ledger("N03")
def test_decoding_equals_the_full_forward(name):
    """Prefill, then one token at a time, then several: the same logits at every place."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(), tokens)
    full, _ = forward(model, params, tokens, ctx)
    logits, state = forward(model, params, tokens[:, :5], ctx.replace(cache_length=T + 3))
    pieces = [logits]
    for start, stop in [(5, 6), (6, 7), (7, 8), (8, T)]:
        logits, state = forward(model, params, tokens[:, start:stop], Context(), state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=1e-5)
    assert int(state["slot"]) == T and state["length"].tolist() == [T] * B


@family_column("decode")
def test_left_padded_decoding_equals_alone(name):
    """Prompts of different lengths, padded on the left, continue as each would alone."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    lengths = (3, 6)
    width, extra = max(lengths), 4
    padded = np.zeros((B, width), np.int32)
    segments = np.zeros((B, width), np.int32)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = tokens[row, :length]
        segments[row, width - length :] = 1
    ctx = with_source(model, Context(segments_BT=jnp.asarray(segments)), tokens)
    logits, state = forward(
        model, params, jnp.asarray(padded), ctx.replace(cache_length=width + extra)
    )
    last = [logits[:, -1]]
    for step in range(extra):
        column = jnp.stack([tokens[row, lengths[row] + step] for row in range(B)])[:, None]
        logits, state = forward(model, params, column, Context(), state)
        last.append(logits[:, -1])
    for row, length in enumerate(lengths):
        alone = with_source(model, Context(), tokens)
        full, _ = forward(model, params, tokens[:, : length + extra], alone)
        ours = jnp.stack([step[row] for step in last])
        np.testing.assert_allclose(ours, full[row, length - 1 : length + extra], atol=1e-5)


@pytest.mark.ledger("B13")
@family_column("causal")
def test_causal(name):
    """A changed token leaves earlier logits bitwise alone, and moves its own and later ones."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(), tokens)
    j = 7
    before, _ = forward(model, params, tokens, ctx)
    after, _ = forward(model, params, tokens.at[:, j].add(1) % model.vocab_size, ctx)
    np.testing.assert_array_equal(before[:, :j], after[:, :j])
    assert (jnp.abs(before - after)[:, j:].max(-1) > 0).all()

    def logits_of(table):
        changed = {**params, "embed": {**params["embed"], "table": table}}
        return model.apply({"params": changed}, marked, ctx)[0][0, :j].sum(0)

    # One token that stands only at place j, so that its row of the table is what place j reads.
    marked = jnp.where(tokens == 5, 6, tokens).at[:, j:].set(5)
    ctx = with_source(model, Context(), jnp.where(tokens == 5, 6, tokens))
    jacobian = jax.jit(jax.jacrev(logits_of))(params["embed"]["table"])
    tied = "head" not in params or "kernel" not in params["head"]
    rows = jnp.delete(jacobian, 5, axis=0) if tied else jacobian  # Logit 5 itself uses row 5.
    assert (rows[:, 5] == 0).all()


@pytest.mark.ledger("B12")
@family_column("bidirectional")
def test_bidirectional(name):
    """Without the causal mask, changing any token changes the outputs at every place."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(causal=False), tokens)
    before, _ = forward(model, params, tokens, ctx)
    for j in range(T):
        after, _ = forward(model, params, tokens.at[:, j].add(1) % model.vocab_size, ctx)
        assert (jnp.abs(before - after).max(-1) > 0).all()


@pytest.mark.ledger("N55", "N58", "B12")
@pytest.mark.parametrize("side", ["left", "right"])
@family_column("padding")
def test_padding_changes_nothing(name, side):
    model, params = tiny(name)
    tokens = random_tokens(model)
    pad = 4
    width = ((0, 0), (pad, 0) if side == "left" else (0, pad))
    inside = slice(pad, None) if side == "left" else slice(None, -pad)
    padded = jnp.pad(tokens, width, constant_values=3)
    segments = jnp.pad(jnp.ones_like(tokens), width)
    alone, _ = forward(model, params, tokens, with_source(model, Context(), tokens))
    ctx = with_source(model, Context(segments_BT=segments), padded, segments)
    together, _ = forward(model, params, padded, ctx)
    np.testing.assert_allclose(together[:, inside], alone, atol=1e-5)
    assert jnp.isfinite(together).all()
    changed = jnp.pad(tokens, width, constant_values=9)
    ctx = with_source(model, Context(segments_BT=segments), changed, segments)
    other, _ = forward(model, params, changed, ctx)
    np.testing.assert_allclose(other[:, inside], together[:, inside], atol=1e-6)


@family_column("packed")
def test_packed_equals_separate(name):
    """Two documents and padding in one row give what each gives alone."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3] * B)
    ctx = Context(segments_BT=segments)
    if isinstance(model, EncoderDecoder):
        ctx = ctx.replace(source_BS=tokens, source_segments_BS=segments)
    packed, _ = forward(model, params, tokens, ctx)
    for part in (slice(0, 5), slice(5, 9)):
        ctx = Context()
        if isinstance(model, EncoderDecoder):
            ctx = ctx.replace(source_BS=tokens[:, part])
        alone, _ = forward(model, params, tokens[:, part], ctx)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)


@family_column("devices")
def test_eight_devices_equal_one(name):
    """Loss and gradients of a batch split over eight devices."""
    assert jax.device_count() == 8
    model, params = tiny(name)
    tokens = random_tokens(model, (8, T))
    ctx = with_source(model, Context(), tokens)
    step = jax.jit(jax.value_and_grad(loss_fn, argnums=1), static_argnums=0)
    one = step(model, params, tokens, ctx)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    eight = step(
        model,
        jax.device_put(params, everywhere),
        jax.device_put(tokens, rows),
        jax.device_put(ctx, rows),
    )
    np.testing.assert_allclose(eight[0], one[0], atol=1e-5)
    for path, leaf in flatten(one[1]).items():
        np.testing.assert_allclose(flatten(eight[1])[path], leaf, atol=1e-5, err_msg=path)


@family_column("gradients")
def test_every_leaf_has_a_gradient(name):
    """Finite and non-zero, in every layer; a key's bias shifts all scores alike and has none."""
    model, params = tiny(name)
    tokens = random_tokens(model)
    ctx = with_source(model, Context(), tokens)
    if hasattr(model, "classifier") and model.classifier is not None:

        def loss(params):
            logits = model.apply({"params": params}, tokens, ctx, method="classify")
            return loss_fn(model, params, tokens, ctx) + jnp.square(logits).sum()

        grads = jax.jit(jax.grad(loss))(params)
    else:
        grads = grads_of(model, params, tokens, ctx)

    for path, grad in flatten(grads).items():
        assert jnp.isfinite(grad).all(), path
        if path.endswith("/k/bias"):
            assert jnp.abs(grad).max() < 1e-5, path
        elif "/pattern/" in path:
            assert (jnp.abs(grad).reshape(grad.shape[0], -1).max(-1) > 0).all(), path
        else:
            assert jnp.abs(grad).max() > 0, path


@family_column("paths")
def test_parameter_paths(name):
    """Paths and shapes are the checkpoint contract: changing them needs a new snapshot on purpose.

    `python -m tests.conformance.snapshot` writes it.
    """
    model, params = tiny(name)
    snapshot = json.loads((pathlib.Path(__file__).parent / "paths.json").read_text())
    assert {path: list(leaf.shape) for path, leaf in flatten(params).items()} == snapshot[name]
    axes = flatten(P.logical_axes(model))
    for path, leaf in flatten(params).items():
        assert len(axes[path]) == leaf.ndim, path
        assert len(set(axes[path])) == leaf.ndim, f"{path} names an axis twice: {axes[path]}"


@family_column("overfit")
def test_overfits_one_batch(name):
    family = FAMILIES[name]
    model = family.build(**family.tiny)
    params = P.init(model, jax.random.key(0))
    tokens = random_tokens(model)
    ctx = with_source(model, Context(unroll=1), tokens)
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(model, params, tokens, ctx)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=150))(
        (params, optimizer.init(params))
    )
    assert losses[-1] < 0.1 < losses[0]
