"""Generation: one text per key, whatever else happens to be in the batch or in the cache."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import flatten
from lm.infer.decoding import RECOMPUTE
from lm.infer.generate import generate_tokens, stream_tokens
from lm.infer.rows import bucket
from lm.layers.attention import Attention
from lm.models import params as P
from lm.models.encdec import EncoderDecoder
from lm.models.families.teeny_gpt import teeny_gpt
from tests.conformance.harness import cells, forward, random_tokens, tiny, with_source

LENGTHS = (1, 13, 5)
NUM_TOKENS = 12


def rows_of(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, n).tolist() for n in lengths]


def inputs(each, lengths=LENGTHS):
    """Prompts, or for an encoder-decoder sources, of these lengths."""
    rows = rows_of(lengths, each.model.vocab_size)
    return {"source": rows} if each.has_encoder else {"prompts": rows}


def reference(model, params, prompt, key, num_tokens, temperature, source=None):
    """The original's sampler: reads the row again for each token, and draws with its own key."""
    tokens = np.zeros((1, 32), np.int32)  # What stands behind the newest token is never seen.
    tokens[0, : len(prompt)] = prompt
    ctx = Context() if source is None else Context(source_BS=jnp.asarray([source]))
    for index in range(num_tokens):
        newest = len(prompt) + index - 1
        logits = np.asarray(forward(model, params, tokens, ctx)[0][0, newest])
        if temperature > 0:
            noise = jax.random.gumbel(jax.random.fold_in(key, index), logits.shape)
            logits = logits / np.float32(temperature) + noise
        tokens[0, newest + 1] = logits.argmax()
    return tokens[0, len(prompt) : len(prompt) + num_tokens].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_equals_a_growing_loop(each, temperature):
    given = inputs(each)
    keys = jax.random.split(jax.random.key(3), len(LENGTHS))
    ours = generate_tokens(
        each.model,
        each.params,
        **given,
        max_new_tokens=NUM_TOKENS,
        keys=keys,
        temperature=temperature,
    ).rows()
    for index, key in enumerate(keys):
        source = given["source"][index] if each.has_encoder else None
        prompt = [each.model.start_id] if each.has_encoder else given["prompts"][index]
        assert ours[index] == reference(
            each.model, each.params, prompt, key, NUM_TOKENS, temperature, source
        )


def test_cached_uncached_batched_and_alone(each):
    given = inputs(each)
    keys = jax.random.split(jax.random.key(1), len(LENGTHS))
    options = dict(
        max_new_tokens=NUM_TOKENS, temperature=1.5, top_k=40, top_p=0.98, min_p=0.001,
        repetition_penalty=1.1,
    )  # fmt: skip

    def run(select=slice(None), **more):
        some = {name: rows[select] for name, rows in given.items()}
        return generate_tokens(
            each.model, each.params, **some, keys=keys[select], **options, **more
        ).rows()

    together = run()
    assert len({tuple(row) for row in together}) == len(LENGTHS)
    assert run(cache=False) == together
    assert [run(slice(i, i + 1))[0] for i in range(len(LENGTHS))] == together
    streamed = [
        list(
            stream_tokens(
                each.model, each.params, *([()] if each.has_encoder else [rows[2]]),
                keys=keys[2:3], **options, **({"source": rows[2]} if each.has_encoder else {}),
            )
        )
        for rows in given.values()
    ]  # fmt: skip
    assert streamed == [together[2]]


def test_seed_gives_a_row_its_key(teeny):
    prompts = rows_of((4, 4, 4), teeny.model.vocab_size)
    run = lambda rows, **o: generate_tokens(  # noqa: E731
        teeny.model, teeny.params, rows, max_new_tokens=12, **o
    ).rows()
    three = run(prompts, seed=5)
    assert run(prompts[:1], seed=5) == three[:1]
    keys = jnp.stack([jax.random.fold_in(jax.random.key(5), i) for i in range(3)])
    assert run(prompts, keys=keys) == three
    assert run(prompts, seed=6) != three
    assert run([prompts[0]] * 3, seed=5)[0] != run([prompts[0]] * 3, seed=5)[1]


def test_settings_differ_by_row(teeny):
    prompts = [[3, 4]] * 3
    keys = jnp.stack([jax.random.key(0)] * 3)
    temperatures = [0.0, 0.8, 2.0]
    run = lambda rows, **o: generate_tokens(  # noqa: E731
        teeny.model, teeny.params, rows, max_new_tokens=15, **o
    ).rows()
    together = run(prompts, temperature=temperatures, keys=keys)
    alone = [run(prompts[:1], temperature=t, keys=keys[:1])[0] for t in temperatures]
    assert together == alone
    assert run(prompts[:1], temperature=1.5, top_k=1) == together[:1]


def test_stop_tokens_end_rows_and_the_loop(teeny):
    prompts = rows_of((4, 13, 3), teeny.model.vocab_size)
    run = lambda **o: generate_tokens(  # noqa: E731
        teeny.model, teeny.params, prompts, max_new_tokens=16, temperature=1.2, **o
    )
    free = run()
    assert free.lengths.tolist() == [16] * 3
    stops = [free.rows()[0][4], free.rows()[1][9]]
    stopped = run(stop_ids=stops, pad_id=28)
    for row, whole, padded in zip(stopped.rows(), free.rows(), stopped.tokens):
        ends = [i + 1 for i, token in enumerate(whole) if token in stops]
        assert row == whole[: ends[0] if ends else 16]
        assert (padded[len(row) :] == 28).all()
    assert stopped.lengths.min() < 16
    assert run(stop_ids=stops, cache=False).rows() == stopped.rows()


def test_the_loop_ends_when_all_rows_have(teeny):
    """A model that was asked for 50 tokens and stops at once reads no further token."""
    calls = []

    def append(*args):
        jax.debug.callback(lambda: calls.append(1))
        return RECOMPUTE.append(*args)

    from lm.infer import generate as module

    counted = RECOMPUTE._replace(append=append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RECOMPUTE", counted)
        every = range(teeny.model.vocab_size)
        new = generate_tokens(
            teeny.model, teeny.params, [[1], [2, 3]], max_new_tokens=50, stop_ids=every, cache=False
        )
        jax.effects_barrier()
        assert new.lengths.tolist() == [1, 1] and calls == []
        new = generate_tokens(
            teeny.model, teeny.params, [[1], [2, 3]], max_new_tokens=5, cache=False
        )
        jax.effects_barrier()
        assert new.lengths.tolist() == [5, 5] and len(calls) == 4


def test_repetition_penalty_counts_prompt_and_new_tokens(teeny):
    """A huge penalty under greedy decoding never repeats a token with a positive logit."""
    model, params = teeny.model, dict(teeny.params)
    params["head"] = {**params["head"], "bias": params["head"]["bias"] + 100.0}
    prompt = [3, 9, 4]
    row = generate_tokens(
        model, params, [prompt], max_new_tokens=20, temperature=0.0, repetition_penalty=1e6
    ).rows()[0]
    assert len({*prompt, *row}) == 23


def test_compilations_are_bounded(compilations):
    """All lengths and batch sizes need few programs; settings, seeds and stop tokens none."""
    model = teeny_gpt(max_length=24, num_layers=1, mlp_multiplier=1)
    params = P.init(model, jax.random.key(0))
    with compilations() as compiled:
        for length in range(1, 24):
            generate_tokens(model, params, rows_of([length], 29), max_new_tokens=24 - length)
    # Prompts are 16 or 24 wide, and new tokens have room for 16 or 24. They meet in 3 ways along
    # this staircase, each of which takes two programs; the keys take one, if nobody made any yet.
    assert len(compiled) in (6, 7)
    with compilations() as compiled:
        for length in (2, 5, 7):
            generate_tokens(
                model, params, rows_of([length], 29), max_new_tokens=17, seed=length,
                temperature=length / 10, top_k=length, top_p=0.9, min_p=0.1,
                repetition_penalty=1 + length, stop_ids=range(length % 8),
            )  # fmt: skip
    assert compiled == []
    with compilations() as compiled:
        for count in range(5, 9):
            generate_tokens(model, params, rows_of([3] * count, 29), max_new_tokens=3)
    assert len(compiled) <= 2 * 3  # Batches of 6 and 8 rows.


def test_bucket():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 49, 65)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 96
    ]  # fmt: skip
    assert bucket(1, least=16) == 16
    for n in range(1, 5000):
        assert n <= bucket(n) < 1.5 * n + 1


@pytest.mark.slow
def test_every_length_up_to_the_model_s_is_reached(teeny):
    limit = teeny.model.max_length
    for length in (1, limit - 1):
        prompt = rows_of([length], teeny.model.vocab_size)
        for cache in (True, False):
            new = generate_tokens(
                teeny.model, teeny.params, prompt, max_new_tokens=limit - length, cache=cache
            )
            assert new.tokens.shape == (1, limit - length)


def test_bad_input_gets_a_clear_sentence(teeny):
    def refuses(match, prompts=((1, 2),), **options):
        options = {"max_new_tokens": 4, **options}
        with pytest.raises(ValueError, match=match):
            generate_tokens(teeny.model, teeny.params, prompts, **options)

    size, limit = teeny.model.vocab_size, teeny.model.max_length
    refuses(
        rf"prompt 1 has the token id {size}, and this model knows 0 to {size - 1}", [[1], [size]]
    )
    refuses("token id -1", [[-1]])
    refuses("prompt 1 is empty", [[1], []])
    refuses("there is no prompt", [])
    refuses(f"{limit - 3} tokens and 4 more .* positions for {limit}", [[1] * (limit - 3)])
    refuses("max_new_tokens must be at least 1", max_new_tokens=0)
    refuses("temperature must be 0 or more", temperature=-1.0)
    refuses("temperature must be 0 or more", temperature=float("nan"))
    refuses("top_k must be", top_k=-1)
    refuses("top_p must be", top_p=0.0)
    refuses("min_p must be", min_p=1.5)
    refuses("repetition_penalty must be", repetition_penalty=0.0)
    refuses(r"temperature has shape \(2,\)", temperature=[1.0, 2.0])
    refuses("give 1, one for each prompt", keys=jax.random.split(jax.random.key(0), 2))
    refuses("seed must be", seed=-1)
    refuses("no encoder", source=[[1]])


def test_an_encoder_decoder_needs_sources(each):
    if not each.has_encoder:
        pytest.skip("a decoder has no source")
    run = lambda **o: generate_tokens(each.model, each.params, max_new_tokens=2, **o)  # noqa: E731
    with pytest.raises(ValueError, match="give the source"):
        run(prompts=[[1]])
    with pytest.raises(ValueError, match="source 0 is empty"):
        run(source=[[]])
    with pytest.raises(ValueError, match="give pairs"):
        run(source=[[1]], prompts=[[1], [2]])


def attention_of(model):
    """Returns the shape of a model's key-value cache: layers, key heads, head size."""
    stack = model.decoder if isinstance(model, EncoderDecoder) else model.stack
    layers = [block.mixer.layer for block in stack.pattern.blocks]
    return layers, stack.repeats


@pytest.mark.ledger("N03")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", cells("decode"))
def test_cache_bytes(name, dtype):
    """Bytes of all keys and values are 2 L B T K H times the size of an item, exactly."""
    model, params = tiny(name)
    layers, repeats = attention_of(model)
    if not all(type(layer) is Attention for layer in layers):
        pytest.skip("its mixers keep no keys and values")
    B, T = 3, 24
    tokens = jnp.ones((B, 5), jnp.int32)
    ctx = with_source(model, Context(cache_length=T, dtype=dtype), tokens)
    _, state = jax.eval_shape(lambda params: model.apply({"params": params}, tokens, ctx), params)
    cached = {
        path: leaf for path, leaf in flatten(nested(state["layers"])).items() if "mixer" in path
    }
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in cached.values())
    itemsize = jnp.dtype(dtype).itemsize
    expected = sum(
        2 * repeats * B * T * (layer.num_kv_heads or layer.num_heads) * layer.head_dim * itemsize
        for layer in layers
    )
    assert num_bytes == expected


def nested(tree):
    """Returns nested dicts for a nest of dicts and tuples."""
    if isinstance(tree, tuple):
        tree = {str(index): item for index, item in enumerate(tree)}
    return {k: nested(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@pytest.mark.ledger("N03")
@pytest.mark.parametrize("name", cells("decode"))
def test_decoding_from_every_place_equals_the_full_forward(name):
    """Wherever the prompt ends, prefill and then single tokens give the full forward's logits."""
    model, params = tiny(name)
    tokens = random_tokens(model, (2, 10))
    ctx = with_source(model, Context(), tokens)
    full, _ = forward(model, params, tokens, ctx)
    for split in (1, 6):
        logits, state = forward(model, params, tokens[:, :split], ctx.replace(cache_length=10))
        np.testing.assert_allclose(logits, full[:, :split], atol=1e-5, rtol=0)
        for place in range(split, 10):
            logits, state = forward(model, params, tokens[:, place, None], Context(), state)
            np.testing.assert_allclose(logits[:, 0], full[:, place], atol=1e-5, rtol=0)


@pytest.mark.ledger("B70")
@pytest.mark.slow
def test_cached_sampling_is_twenty_times_faster_and_the_same():
    """teenyGPT at B=64, T=150 against a jitted recompute of fixed length, same keys."""
    model = teeny_gpt()
    params = P.init(model, jax.random.key(0))
    B, T = 64, 150
    start_id = model.vocab_size - 1
    prompts = [[start_id]] * B
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), b) for b in range(B)])

    def cached():
        return generate_tokens(model, params, prompts, max_new_tokens=T - 1).tokens

    @jax.jit
    def draw(params, tokens, keys, place):
        logits, _ = model.apply({"params": params}, tokens)
        logits = logits[:, place - 1]
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, place - 1)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        drawn = jnp.argmax(logits + noise, -1)
        return tokens.at[:, place].set(drawn)

    def recompute():
        tokens = jnp.zeros((B, T), jnp.int32).at[:, 0].set(start_id)
        for place in range(1, T):
            tokens = draw(params, tokens, keys, place)
        return np.asarray(tokens[:, 1:])

    cached()
    draw(params, jnp.zeros((B, T), jnp.int32), keys, 1)
    began = time.perf_counter()
    ours = cached()
    middle = time.perf_counter()
    slow = recompute()
    ended = time.perf_counter()
    np.testing.assert_array_equal(ours, slow)
    speedup = (ended - middle) / (middle - began)
    print(f"recompute {ended - middle:.1f} s, cached {middle - began:.2f} s: {speedup:.0f} times")
    assert speedup >= 20


@pytest.mark.ledger("B70")
def test_temperature_towards_zero_is_argmax(teeny):
    prompts = rows_of((3, 8, 1), teeny.model.vocab_size)
    run = lambda t: generate_tokens(  # noqa: E731
        teeny.model, teeny.params, prompts, max_new_tokens=16, temperature=t
    ).rows()
    greedy = [reference(teeny.model, teeny.params, prompt, None, 16, 0.0) for prompt in prompts]
    assert run(0.0) == greedy
    assert run(1e-5) == greedy
    assert run(1.0) != greedy
