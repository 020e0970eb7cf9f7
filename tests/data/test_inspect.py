import numpy as np
import pytest

from lm.data.example import Example
from lm.data.inspect import (
    describe_batch,
    describe_statistics,
    inspect_source,
    statistics,
    train_tokenizer,
)
from lm.data.pipeline import make_loader
from lm.data.tokenizer import teeny_gpt_tokenizer


@pytest.mark.parametrize(("layout", "length"), [("rows", 40), ("pack", 40), ("rows", 200)])
def test_statistics_equal_what_the_batches_hold(validation, layout, length):
    numbers = statistics(validation, length, layout)
    loader = make_loader(validation, batch_size=1, length=length, layout=layout, epochs=1)
    batches = list(loader)
    assert numbers["rows"] == len(batches) and numbers["documents"] == len(validation)
    assert numbers["predictions"] == sum(batch.weights.sum() for batch in batches)
    padding = np.mean([np.mean(batch.segments == 0) for batch in batches])
    assert numbers["padding"] == pytest.approx(padding, abs=1e-12)
    longer = [len(example.tokens) - 1 - length for example in validation]
    cut = [n for n in longer if n > 0] if layout == "rows" else []
    assert (numbers["truncated"], numbers["dropped"]) == (len(cut), sum(cut))
    assert "truncated" in describe_statistics(numbers)


def test_a_batch_as_text():
    t = teeny_gpt_tokenizer()
    examples = [Example(np.array([28, *t.encode(text), 0])) for text in ("bad news", "no", "oh")]
    options = {"batch_size": 1, "length": 13, "shuffle": False, "epochs": 1}
    assert describe_batch(next(make_loader(examples, layout="pack", **options)), t) == (
        "row 0: segments 1x9 2x3 3x1; weights 1x13\n"
        "  1: 'bad news' [end]\n"
        "  2: 'no' [end]\n"
        "  3: 'o'\n"
        "(1, 13) places, padding 0.0%"
    )
    assert describe_batch(next(make_loader(examples, **options)), t) == (
        "row 0: segments 1x9 0x4; weights 1x9 0x4\n"
        "  1: 'bad news' [end]\n"
        "(1, 13) places, padding 30.8%"
    )


def test_inspect_a_source(original):
    text = inspect_source(original["validation"], teeny_gpt_tokenizer(), 150, num_rows=2)
    assert "documents  3,121" in text and "row 1: segments 1x" in text and "[end]" in text


def test_train_tokenizer(headlines):
    source = headlines["test"]
    bpe = train_tokenizer("bpe", source, 400)
    assert bpe.vocab_size == 400 and bpe.decode(bpe.encode("Anything — at all")) == (
        "Anything — at all"
    )
    assert train_tokenizer("wordpiece", ["some text"], 60).vocab_size <= 60
    chars = train_tokenizer("chars", source, unknown="unk")
    assert set(chars.symbols[4:]) == {c for text in source for c in text.text}
    assert train_tokenizer("teeny_gpt", []) == teeny_gpt_tokenizer()
    with pytest.raises(ValueError, match="A tokenizer is one of"):
        train_tokenizer("words", source)
    with pytest.raises(ValueError, match="need a vocab_size"):
        train_tokenizer("bpe", source)
    with pytest.raises(ValueError, match="have their own"):
        train_tokenizer("chars", source, 100)
