import dataclasses
import itertools
import json

import numpy as np
import pytest

from lm.core.batch import Batch
from lm.data.example import Example, start_id, tokenize
from lm.data.pipeline import best_fit, make_loader, permutation
from lm.data.source import load_source
from lm.data.tokenizer import SubwordTokenizer, teeny_gpt_tokenizer, train_bpe

FIELDS = ("tokens", "targets", "weights", "segments", "positions")


def toy(num=23, seed=0, vocab_size=50):
    """Documents of 1 to 20 predictions; each begins with 1 and ends with 2."""
    rng = np.random.default_rng(seed)
    return [
        Example(np.array([1, *rng.integers(3, vocab_size, rng.integers(0, 20)), 2]))
        for _ in range(num)
    ]


def take(loader, num):
    return list(itertools.islice(loader, num))


def assert_equal(left: Batch, right: Batch):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)


def documents(batches):
    """The documents' texts, put together from segments, in order; cut ones come in pieces."""
    for batch in batches:
        for tokens, targets, segments in zip(batch.tokens, batch.targets, batch.segments):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                yield (*tokens[here], targets[here][-1])


@pytest.mark.ledger("D07")
@pytest.mark.parametrize("layout", ["rows", "pack", "fit"])
@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_every_global_batch(layout, process_count):
    options = {"batch_size": 6, "length": 16, "layout": layout, "seed": 3}
    whole = take(make_loader(toy(), **options), 12)
    parts = [
        take(make_loader(toy(), **options, process_index=p, process_count=process_count), 12)
        for p in range(process_count)
    ]
    for batch, *shares in zip(whole, *parts):
        for name in FIELDS:
            joined = np.concatenate([getattr(share, name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(batch, name))


@pytest.mark.ledger("D07")
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_shards_are_disjoint_and_their_union_is_the_set(validation, process_count):
    options = {"batch_size": 8, "length": 180, "epochs": 1, "process_count": process_count}
    shards = [
        list(documents(make_loader(validation, **options, process_index=p)))
        for p in range(process_count)
    ]
    # No two lines are alike, so a line that two shards had would be counted twice.
    counted = sorted(itertools.chain(*shards))
    assert counted == sorted(tuple(example.tokens) for example in validation)
    assert len(set(counted)) == len(counted)


@pytest.mark.ledger("D07")
@pytest.mark.parametrize("layout", ["rows", "pack", "fit"])
def test_a_batch_is_a_function_of_seed_and_step(layout):
    options = {"batch_size": 4, "length": 16, "layout": layout}
    first = take(make_loader(toy(), **options, seed=5), 30)
    for left, right in zip(first, take(make_loader(toy(), **options, seed=5, prefetch=7), 30)):
        assert_equal(left, right)
    for step in (0, 1, 7, 29):
        loader = make_loader(toy(), **options, seed=5, start=step)
        assert loader.state()["step"] == step and loader.num_batches is None
        assert_equal(next(loader), first[step])
    other = next(make_loader(toy(), **options, seed=6))
    assert (other.tokens != first[0].tokens).any()


@pytest.mark.ledger("D07")
@pytest.mark.parametrize("layout", ["rows", "pack", "fit"])
def test_the_position_survives_another_number_of_processes(layout):
    options = {"batch_size": 4, "length": 16, "layout": layout, "seed": 1}
    whole = take(make_loader(toy(), **options), 20)
    loader = make_loader(toy(), **options, process_index=1, process_count=2)
    take(loader, 9)
    state = json.loads(json.dumps(loader.state()))
    assert state["step"] == 9
    resumed = make_loader(toy(), **options, process_index=3, process_count=4)
    resumed.restore(state)
    for batch, share in zip(whole[9:], take(resumed, 11)):
        np.testing.assert_array_equal(share.tokens, batch.tokens[3:])
    assert resumed.state()["step"] == 20
    resumed.restore({**state, "step": 2})  # Backwards too.
    np.testing.assert_array_equal(next(resumed).tokens, whole[2].tokens[3:])


def test_a_position_of_other_data_is_refused():
    options = {"batch_size": 4, "length": 16, "seed": 1}
    state = make_loader(toy(), **options).state()
    for change in ({"batch_size": 8}, {"seed": 2}, {"length": 8}, {"layout": "pack"}):
        with pytest.raises(ValueError, match="restore it with the same data settings"):
            make_loader(toy(), **{**options, **change}).restore(state)
    with pytest.raises(ValueError, match="saved with num_rows=23"):
        make_loader(toy(24), **options).restore(state)
    with pytest.raises(ValueError, match="A data position has the fields"):
        make_loader(toy(), **options).restore({"step": 3})


@pytest.mark.parametrize("layout", ["rows", "pack", "fit"])
def test_every_epoch_has_every_document_in_another_order(layout):
    examples = toy(40)
    loader = make_loader(examples, batch_size=1, length=32, layout=layout, seed=2)
    num_rows = loader.state()["num_rows"]
    epochs = [list(documents(take(loader, num_rows))) for _ in range(3)]
    if layout != "pack":
        for epoch in epochs:
            assert sorted(epoch) == sorted(tuple(example.tokens) for example in examples)
    assert epochs[0] != epochs[1] != epochs[2]
    pairs = [sorted(itertools.chain(*(itertools.pairwise(d) for d in epoch))) for epoch in epochs]
    want = sorted(itertools.chain(*(itertools.pairwise(e.tokens.tolist()) for e in examples)))
    assert pairs == [want] * 3


def test_the_order_is_pinned():
    # A run that is resumed years later must see the same order.
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))


@pytest.mark.parametrize("length", [1, 7, 16, 200])
def test_packing_equals_a_plain_loop(length):
    examples = toy(31, seed=4)
    order = permutation(31, 9, 0)
    places = []  # (token, target, document, position in it)
    for document in order:
        pairs = itertools.pairwise(examples[document].tokens.tolist())
        places += [(*pair, document, n) for n, pair in enumerate(pairs)]
    loader = make_loader(examples, batch_size=1, length=length, layout="pack", seed=9, epochs=1)
    batches = list(loader)
    assert len(batches) == -(-len(places) // length)
    for n, batch in enumerate(batches):
        here = places[n * length : (n + 1) * length]
        seen = list(dict.fromkeys(document for _, _, document, _ in here))
        filled = slice(0, len(here))
        assert batch.tokens[0, filled].tolist() == [token for token, _, _, _ in here]
        assert batch.targets[0, filled].tolist() == [target for _, target, _, _ in here]
        assert batch.segments[0, filled].tolist() == [seen.index(d) + 1 for _, _, d, _ in here]
        begin = here[0][3]  # A document that a row cuts begins anew at 0.
        want = [p - begin if d == here[0][2] else p for _, _, d, p in here]
        assert batch.positions[0, filled].tolist() == want
        assert (batch.weights[0, filled] == 1).all()
        for name in FIELDS:
            assert (getattr(batch, name)[0, len(here) :] == 0).all()


def test_best_fit_equals_a_plain_loop():
    rng = np.random.default_rng(5)
    for capacity in (1, 9, 149):
        sizes = rng.integers(1, capacity + 1, 300)
        rooms, bins = [], []
        for item in sorted(range(300), key=lambda n: -sizes[n]):
            room = min((r for r in rooms if r >= sizes[item]), default=None)
            if room is None:
                rooms.append(capacity - sizes[item])
            else:
                rooms[rooms.index(room)] -= sizes[item]
        bins = best_fit(sizes, capacity)
        assert sorted(capacity - sizes[items].sum() for items in bins) == sorted(rooms)
        assert sorted(itertools.chain(*bins)) == list(range(300))


def test_fitted_rows_hold_whole_documents():
    """Only what is longer than a row is cut, into full rows and a rest; positions start at 0."""
    examples = toy(40, seed=3)
    loader = make_loader(examples, batch_size=1, length=12, layout="fit", epochs=1)
    found = []
    for batch in loader:
        segments, positions = batch.segments[0], batch.positions[0]
        for segment in range(1, segments.max() + 1):
            assert positions[segments == segment].tolist() == list(
                range((segments == segment).sum())
            )
    for document in documents(
        make_loader(examples, batch_size=1, length=12, layout="fit", epochs=1)
    ):
        found.append(len(document) - 1)
    want = []
    for example in examples:
        pairs = len(example.tokens) - 1
        want += [12] * (pairs // 12) + [pairs % 12] * (pairs % 12 > 0)
    assert sorted(found) == sorted(want)


def test_rows_are_teeny_gpts(original, validation):
    t = teeny_gpt_tokenizer()
    texts = [text.text for text in original["validation"]][:64]
    batch = next(make_loader(validation, batch_size=64, length=150, shuffle=False, epochs=1))
    for n, text in enumerate(texts):
        row = np.array(t.row(text, 151))
        segments = np.arange(150) <= len(text)
        np.testing.assert_array_equal(batch.tokens[n], row[:-1])
        np.testing.assert_array_equal(batch.targets[n], row[1:])
        # The text and the first 0 after it count; the rest of the padding does not.
        np.testing.assert_array_equal(batch.weights[n], segments)
        np.testing.assert_array_equal(batch.segments[n], segments)
        np.testing.assert_array_equal(batch.positions[n], np.where(segments, np.arange(150), 0))
    assert batch.tokens.dtype == batch.targets.dtype == batch.segments.dtype == np.int32
    assert batch.weights.dtype == np.float32


def test_long_rows_are_cut_before_the_end_of_text():
    example = Example(np.array([1, 5, 6, 7, 8, 2]))
    batch = next(make_loader([example], batch_size=1, length=3))
    assert batch.tokens.tolist() == [[1, 5, 6]] and batch.targets.tolist() == [[5, 6, 7]]
    batch = next(make_loader([example], batch_size=1, length=5))
    assert batch.targets.tolist() == [[5, 6, 7, 8, 2]] and batch.weights.all()


@pytest.mark.parametrize("layout", ["rows", "pack", "fit"])
def test_evaluation_is_one_pass_in_order_that_drops_nothing(layout):
    examples = toy(23)
    options = {"batch_size": 8, "length": 20, "layout": layout, "shuffle": False, "epochs": 1}
    loader = make_loader(examples, **options, pad_id=49)
    batches = list(loader)
    assert len(batches) == loader.num_batches and {b.tokens.shape for b in batches} == {(8, 20)}
    total = sum(len(example.tokens) - 1 for example in examples)
    assert sum(batch.weights.sum() for batch in batches) == total
    if layout == "rows":
        assert list(documents(batches)) == [tuple(example.tokens) for example in examples]
        last = batches[-1]
        assert (last.segments[7] == 0).all() and (last.weights[7] == 0).all()
        assert (last.tokens[7] == 49).all() and (last.targets[7] == 49).all()


def test_weights_of_an_example_belong_to_its_targets():
    example = Example(np.array([1, 5, 6, 2]), np.array([9, 0, 0.5, 1]))
    batch = next(make_loader([example], batch_size=1, length=5))
    assert batch.weights.tolist() == [[0, 0.5, 1, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 0, 0]]


def test_sources_for_an_encoder_decoder():
    examples = [
        Example(np.array([1, 5, 2]), source=np.array([7, 8, 2])),
        Example(np.array([1, 6, 2]), source=np.array([9])),
    ]
    options = {"batch_size": 2, "length": 3, "shuffle": False, "epochs": 1}
    batch = next(make_loader(examples, **options, source_length=2, pad_id=3))
    assert batch.source.tolist() == [[7, 8], [9, 3]]
    assert batch.source_segments.tolist() == [[1, 1], [1, 0]]
    for change in ({}, {"source_length": 2, "layout": "pack"}):
        with pytest.raises(ValueError, match="need source_length and the layout 'rows'"):
            make_loader(examples, **options, **change)
    with pytest.raises(ValueError, match="take no source_length"):
        make_loader(toy(), **options, source_length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": []}, "The split is empty"),
        ({"process_count": 3}, r"3 processes should share a batch evenly, and batch_size is 4"),
        ({"process_index": 2, "process_count": 2}, "this is process 2"),
        ({"length": 0}, "should be 1 or more"),
        ({"seed": -1}, "seed and start 0 or more"),
        ({"layout": "heap"}, r"one of \('rows', 'pack', 'fit'\), not 'heap'"),
        ({"vocab_size": 20}, r"should be in 0\.\.19 and are in 1\.\."),
    ],
)
def test_bad_settings(change, message):
    options = {"examples": toy(), "batch_size": 4, "length": 8, **change}
    with pytest.raises(ValueError, match=message):
        make_loader(options.pop("examples"), **options)


def test_a_corpus_is_checked_against_the_vocabulary(validation):
    make_loader(validation, batch_size=4, length=8, vocab_size=29)
    with pytest.raises(ValueError, match=r"should be in 0\.\.27"):
        make_loader(validation, batch_size=4, length=8, vocab_size=28)


def test_tokenize_is_cached_by_text_and_tokenizer(tmp_path, cache, monkeypatch):
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "en": t.upper()}) for t in ("çava?", "b", "hello you"))
    )
    source = load_source(f"text:{tmp_path}/train.jsonl", "train", source_field="en")
    bpe = train_bpe(["hello you"], 260)
    corpus = tokenize(source, bpe)
    for text, example in zip(source, corpus):
        assert example.tokens.tolist() == [0, *bpe.encode(text.text), 0]
        assert example.source.tolist() == [*bpe.encode(text.source), 0]
    assert corpus.num_chars == 15 and corpus.num_bytes == 16
    teeny = tokenize(source, teeny_gpt_tokenizer())
    assert teeny.num_chars == teeny.num_bytes == 14  # The question mark is not predicted.
    assert teeny.fingerprint != corpus.fingerprint
    encode = pytest.fail
    monkeypatch.setattr(SubwordTokenizer, "encode_batch", lambda *a: encode("tokenized again"))
    assert tokenize(source, bpe).fingerprint == corpus.fingerprint


def test_a_tokenizer_without_end_of_text_is_refused():
    bpe = train_bpe(["x"], 257)
    assert start_id(dataclasses.replace(bpe, bos=None)) == 0
    with pytest.raises(ValueError, match="should name an end-of-text token"):
        start_id(dataclasses.replace(bpe, eos=None))
