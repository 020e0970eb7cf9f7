"""What each command of `lm` does, as functions that print."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lm.core.config import fields_of, from_json
from lm.core.overrides import apply_overrides, list_fields
from lm.data.corpus import TextData
from lm.data.inspect import inspect_source
from lm.data.inspect import train_tokenizer as make_tokenizer
from lm.data.labelled import LabelledData
from lm.data.source import load_source
from lm.data.tokenizer import load_tokenizer
from lm.eval.classification import classification_report
from lm.eval.perplexity import evaluate as measure
from lm.eval.samples import draw_samples, write_samples
from lm.infer.generate import generate as continue_texts
from lm.infer.generate import stream
from lm.models import params as P
from lm.models.zoo import all_families, get_family
from lm.opening import export_model as write_directory
from lm.opening import import_model as write_run
from lm.opening import initial_params, load
from lm.train.experiment import Experiment, load_experiment
from lm.train.loop import Result
from lm.train.loop import train as run_training
from lm.train.run_dir import read_config

SAMPLE_TOKENS = 100


def train(
    path: str,
    overrides: Sequence[str] = (),
    run_dir: str = "",
    checkpoint_dir: str = "",
    init_from: str = "",
) -> Result:
    """Trains the experiment of a file, then samples from it and compares it with n-grams.

    Args:
      path: `experiments/NAME.py`, or NAME.
      overrides: `--field value` pairs.
      run_dir: where it writes; '' is runs/NAME. The run that is there goes on.
      checkpoint_dir: another place for checkpoints, such as gs://bucket/run; '' for none.
      init_from: what to start from, anything that `lm.load` opens; '' is fresh parameters.
    """
    experiment = apply_overrides(load_experiment(path), overrides)
    directory = Path(run_dir or Path("runs") / experiment.name)
    result = run_training(
        experiment,
        directory,
        checkpoint_dir=checkpoint_dir or None,
        params=partial(initial_params, init_from, experiment.model) if init_from else None,
        init_from=init_from,
    )
    if result.stopped in ("finished", "early stopping"):
        report(experiment, result, checkpoint_dir)
    again = f"lm train {path}"
    then = (
        f"lm generate {directory} --prompt '...'"
        if result.stopped in ("finished", "early stopping")
        else f"{again} goes on from step {result.step}"
    )
    print(f"everything is in {directory}; next: {then}")
    return result


def report(experiment: Experiment, result: Result, checkpoint_dir: str = "") -> None:
    """Prints bits per character beside n-gram models, and ten samples at two temperatures.

    Of a classifier it prints accuracy and macro-F1 beside baselines.
    """
    loaded = load(result.run_dir, checkpoint_dir=checkpoint_dir or None)
    if isinstance(experiment.data, LabelledData):
        data = experiment.data.make(loaded.tokenizer)
        rows = classification_report(loaded.model, loaded.params, data, experiment.train.batch_size)
        print(f"test, {len(data.splits['test']):,} texts     accuracy  macro-F1")
        for name, scores in rows.items():
            print(f"  {name:<24} {scores['accuracy']:.3f}     {scores['macro_f1']:.3f}")
        (result.run_dir / "classification.json").write_text(json.dumps(rows, indent=1) + "\n")
        return
    if result.best_loss is not None and hasattr(experiment.data, "make"):
        data = experiment.data.make(loaded.tokenizer)
        bits = {"this model": data.bits_per_character(result.best_loss), **data.baselines()}
        print("validation, bits per character:")
        for name, value in sorted(bits.items(), key=lambda item: -item[1]):
            print(f"  {name:<12} {value:.3f}")
        (result.run_dir / "bits_per_character.json").write_text(json.dumps(bits, indent=1) + "\n")
    length = loaded.model.max_length
    tokens = SAMPLE_TOKENS if length is None else min(SAMPLE_TOKENS, length - 1)
    samples = draw_samples(loaded, max_new_tokens=tokens, count=10)
    write_samples(result.run_dir / "samples.txt", samples)
    print((result.run_dir / "samples.txt").read_text(), end="")


def train_help(path: str = "") -> str:
    """Returns how to call `lm train`, with the fields of an experiment where one is named."""
    lines = [
        "usage: lm train EXPERIMENT [--run-dir DIR] [--checkpoint-dir PATH] [--init-from MODEL]",
        "                [--platform NAME] [--FIELD VALUE ...]",
        "",
        "Trains experiments/NAME.py (or NAME), or goes on where its run directory stopped.",
        "",
        "  --run-dir DIR          where the run writes [runs/NAME]",
        "  --checkpoint-dir PATH  another place for checkpoints, such as gs://bucket/run",
        "  --init-from MODEL      a run, directory, .gguf file or package:NAME to start from",
        "  --platform NAME        cpu, gpu or tpu to insist on",
        "",
    ]
    if not path:
        return "\n".join([*lines, "lm train EXPERIMENT --help lists the fields it has."])
    lines.append("Fields, and what they are:")
    for name, value in list_fields(load_experiment(path)):
        lines.append(f"  --{name.replace('_', '-')} {value}")
    return "\n".join(lines)


def generate(
    model: Positional[str],
    prompt: Sequence[str] = ("",),
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    dtype: str = "float32",
) -> list[str]:
    """Continues prompts and prints each with its continuation.

    Args:
      model: a run directory, a Hugging Face directory, a .gguf file, package:NAME, or a hub id.
      prompt: texts to continue; for an encoder-decoder, texts to read.
      max_new_tokens: at most that many tokens each.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 for all.
      top_p: keep the likeliest tokens that hold this probability.
      min_p: drop tokens less likely than this share of the likeliest.
      repetition_penalty: above 1 discourages tokens that are there already.
      num_samples: continuations of each prompt.
      seed: the same seed gives the same text.
      dtype: float32 or bfloat16.
    """
    loaded = load(model, dtype=dtype)
    prompts = [text for text in prompt for _ in range(num_samples)]
    room = loaded.model.max_length
    texts = continue_texts(
        loaded,
        prompts,
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room - 1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=dtype,
    )
    for start, text in zip(prompts, texts):
        print(start + text)
    return texts


def chat(
    model: Positional[str], max_new_tokens: int = 200, temperature: float = 0.8, top_p: float = 0.95
) -> None:
    """Continues what is typed, line by line, as it is drawn; an empty line ends it.

    Args:
      model: a run directory, a Hugging Face directory, a .gguf file, package:NAME, or a hub id.
      max_new_tokens: at most that many tokens each.
      temperature: 0 is greedy.
      top_p: keep the likeliest tokens that hold this probability.
    """
    loaded = load(model)
    room = loaded.model.max_length
    seed = 0
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        limit = max_new_tokens
        if room is not None:
            limit = min(limit, room - 1 - len(loaded.tokenizer.encode(text)))
        options = dict(temperature=temperature, top_p=top_p, seed=seed)
        for piece in stream(loaded, text, max_new_tokens=limit, **options):
            print(piece, end="", flush=True)
        print()
        seed += 1


def import_model(source: Positional[str], run: Positional[str]) -> None:
    """Writes a pretrained model as a run directory, which the other commands open.

    Args:
      source: a Hugging Face directory, a .gguf file, package:NAME, a hub id, or another run.
      run: the directory to write; it must not exist.
    """
    print(f"everything is in {write_run(source, run)}; next: lm generate {run} --prompt '...'")


def export_model(model: Positional[str], directory: Positional[str]) -> None:
    """Writes a model as a Hugging Face directory, which `from_pretrained` opens.

    Args:
      model: a run directory, a .gguf file, package:NAME, or another that `lm.load` opens.
      directory: what to write; it must not exist.
    """
    print(f"everything is in {write_directory(model, directory)}")


def evaluate(
    model: Positional[str], split: str = "validation", data: str = "", batch_size: int = 32
) -> dict[str, float]:
    """Measures a model on a split: loss, perplexity, bits, top-1 reconstruction.

    Args:
      model: a run directory; or another model, with `data`.
      split: train, validation or test.
      data: another text: headlines, text:PATH or tfds:NAME; '' is what the run was trained on.
      batch_size: rows of a batch.
    """
    loaded = load(model)
    if data:
        length = min(256, (loaded.model.max_length or 257) - 1)
        config: Any = TextData(data, length=length)
    elif (Path(model) / "checkpoints").is_dir() and "data" in read_config(model)["experiment"]:
        config = from_json(read_config(model)["experiment"]["data"])
    else:
        raise ValueError(f"{model} was not trained here, so say what to read: --data text:PATH")
    batches = config.make(loaded.tokenizer).evaluation(split, batch_size)
    metrics = measure(loaded.model, loaded.params, batches, tokenizer=loaded.tokenizer)
    print(json.dumps({"model": model, "split": split, **metrics}, indent=1))
    return metrics


def list_models(name: Positional[str] = "", preset: str = "") -> None:
    """Prints every family with its presets and parameter counts, or draws one.

    Args:
      name: a family to draw; '' lists all.
      preset: which of its sizes to draw; '' is the first.
    """
    if not name:
        for family in all_families().values():
            rows = ", ".join(family.ledger)
            about = (sys.modules[family.build.__module__].__doc__ or "").splitlines()[0]
            print(f"{family.name:<10} {about}")
            for key in family.presets:
                print(f"  {key:<12} {P.count(family.preset(key)):>18,} parameters")
            print(f"  {'ledger':<12} {rows}")
        return
    family = get_family(name)
    preset = preset or next(iter(family.presets))
    model = family.preset(preset)
    print(f"{name} {preset}: {P.count(model):,} parameters")
    print(draw(model))
    for cell, reason in family.inapplicable.items():
        print(f"not tested for {cell!r}: {reason}")


def draw(value: Any, indent: int = 0) -> str:
    """Returns a composition as an indented outline: one part a line, with its own numbers."""
    pad = "  " * indent
    own, parts = [], []
    for name, field in fields_of(type(value)).items():
        item = getattr(value, name)
        if dataclasses.is_dataclass(item) and hasattr(item, "apply"):
            parts.append((name, item))
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            parts += [(f"{name}[{i}]", part) for i, part in enumerate(item)]
        elif item != field.default and item != () and not name.endswith("init"):
            own.append(f"{name}={item}")
    lines = [f"{type(value).__name__}({', '.join(own)})"]
    for name, part in parts:
        if type(part).__name__ == "Blocks" and not part.blocks:
            continue
        lines.append(f"{pad}  {name}: {draw(part, indent + 1)}")
    return "\n".join(lines)


def inspect_data(
    source: Positional[str] = "headlines",
    tokenizer: str = "teeny_gpt",
    split: str = "train",
    length: int = 149,
    layout: str = "rows",
    num_rows: int = 4,
) -> None:
    """Shows rows of a data set as text, with masks, segments and statistics.

    Args:
      source: headlines, headlines/original, text:PATH or tfds:NAME.
      tokenizer: teeny_gpt, chars, bpe:SIZE, wordpiece:SIZE, or the path of a tokenizer.json.
      split: train, validation or test.
      length: places of a row.
      layout: rows, pack, or fit.
      num_rows: how many to show.
    """
    config = TextData(source, tokenizer, length, layout)  # pyright: ignore
    print(inspect_source(config.load(split), config.make_tokenizer(), length, layout, num_rows))


def train_tokenizer(
    source: Positional[str],
    out: str,
    kind: str = "bpe",
    vocab_size: int | None = 8192,
    split: str = "train",
) -> None:
    """Trains a tokenizer and writes its tokenizer.json.

    Args:
      source: headlines, text:PATH or tfds:NAME.
      out: directory to write to.
      kind: bpe, wordpiece or chars.
      vocab_size: tokens of bpe and wordpiece.
      split: which texts to train on.
    """
    texts = load_source(source, split)
    size = vocab_size if kind in ("bpe", "wordpiece") else None
    tokenizer = make_tokenizer(kind, texts, size)  # pyright: ignore
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    assert load_tokenizer(out).vocab_size == tokenizer.vocab_size
    print(f"{tokenizer.vocab_size:,} tokens, written to {out}/tokenizer.json", file=sys.stderr)
