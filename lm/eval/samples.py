"""Samples of a run, and what Figure 2 of the teenyGPT post says of them in numbers."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lm.infer.generate import generate

Samples = dict[float, list[str]]


def draw_samples(
    loaded: Any,
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.5, 1.0),
    count: int = 10,
    prompt: str = "",
    seed: int = 0,
) -> Samples:
    """Returns `count` texts at each temperature, all drawn in one batch.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      max_new_tokens: at most that many tokens each.
      temperatures: see `Sampling`.
      count: texts at each temperature.
      prompt: what they begin with; it is part of them.
      seed: text i of temperature j draws with `fold_in(key(seed), j * count + i)`.
    """
    texts = generate(
        loaded,
        [prompt] * (count * len(temperatures)),
        max_new_tokens=max_new_tokens,
        temperature=[temperature for temperature in temperatures for _ in range(count)],
        seed=seed,
    )
    return {
        temperature: [prompt + text for text in texts[j * count : (j + 1) * count]]
        for j, temperature in enumerate(temperatures)
    }


def write_samples(path: str | Path, samples: Samples) -> None:
    """Writes samples as text: a heading for each temperature, then a line for each sample."""
    blocks = [
        "\n".join(
            [f"temperature {temperature:g}", *(" ".join(text.splitlines()) for text in texts)]
        )
        for temperature, texts in samples.items()
    ]
    Path(path).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def out_of_lexicon_rate(texts: Sequence[str], lexicon: Collection[str]) -> float:
    """Returns the share of the texts' words (between white space) that are not in the lexicon.

    Raises:
      ValueError: if the texts have no words.
    """
    words = [word for text in texts for word in text.split()]
    if not words:
        raise ValueError("the samples have no words to look up: draw more, or longer ones")
    return sum(word not in lexicon for word in words) / len(words)


def repeated_bigram_rate(texts: Sequence[str]) -> float:
    """Returns 1 - distinct bigrams of words / all bigrams, over all texts together.

    It is the share of bigrams that an earlier place, in the same text or in another, had already.

    Raises:
      ValueError: if no text has two words.
    """
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    if not bigrams:
        raise ValueError("the samples have no two words in a row: draw more, or longer ones")
    return 1 - len(set(bigrams)) / len(bigrams)


def temperature_sweep(
    loaded: Any,
    lexicon: Collection[str],
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.3, 0.7, 1.0, 1.3),
    count: int = 200,
    seed: int = 0,
) -> dict[float, dict[str, float]]:
    """Returns the two rates at each temperature: cold samples repeat, hot ones are nonsense.

    Args:
      loaded: has `.model`, `.params` and `.tokenizer`.
      lexicon: the words of the training text, as a set.
      max_new_tokens, temperatures, count, seed: as of `draw_samples`.
    """
    samples = draw_samples(
        loaded, max_new_tokens=max_new_tokens, temperatures=temperatures, count=count, seed=seed
    )
    return {
        temperature: {
            "out_of_lexicon": out_of_lexicon_rate(texts, lexicon),
            "repeated_bigrams": repeated_bigram_rate(texts),
        }
        for temperature, texts in samples.items()
    }
