"""`lm generate`, `lm chat`, `lm classify`, `lm evaluate`: what a trained model is for."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lm.commands.benchmark import benchmark, task_names
from lm.commands.many import generate_file
from lm.core.config import from_json
from lm.data.corpus import TextData
from lm.data.labelled import LabelledData
from lm.eval.classification import classification_report
from lm.eval.perplexity import evaluate as measure
from lm.infer.classify import classify as label_texts
from lm.infer.generate import generate as continue_texts
from lm.infer.generate import stream
from lm.infer.rows import encode
from lm.opening import load
from lm.train.run_dir import read_config


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
    adapter: str = "",
    dtype: str = "float32",
    cache_dtype: str = "",
    chat: bool = False,
    prompts: str = "",
    out: str = "",
    slots: int = 8,
    resume: bool = False,
) -> list[str]:
    """Continues prompts and prints each with its continuation, and how fast it was.

    With `--prompts FILE --out FILE` any number of prompts, `--slots` at a time: each gives its
    place to the next one when it is finished.

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
      adapter: a PEFT directory, or a run that trained an adapter, to use with the model.
      dtype: float32 or bfloat16.
      cache_dtype: float32, bfloat16 or int8, for keys and values; '' is that of --dtype.
      chat: each prompt is what a user says, and a reply is printed, by the model's chat template.
      prompts: a file with a prompt a line; of a .jsonl file, "prompt" or "messages" of each object.
      out: where their continuations are written, a JSON object a line, as they are finished.
      slots: how many are continued at the same time.
      resume: goes on with an output file that is there.
    """
    if prompts and not out:
        raise ValueError("--prompts needs --out FILE.jsonl, where the texts are to be written")
    loaded = load(model, adapter=adapter or None, dtype=dtype)
    room = loaded.model.max_length
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room - 1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=dtype,
        cache_dtype=cache_dtype or None,
    )
    if prompts:
        found = generate_file(loaded, prompts, out, resume=resume, slots=slots, **options)
        return [finished.text for finished in sorted(found)]
    starts = [text for text in prompt for _ in range(num_samples)]
    texts = continue_texts(
        loaded,
        [[said(text)] for text in starts] if chat else starts,
        report=lambda speed: print(speed, file=sys.stderr),
        **options,
    )
    for start, text in zip(starts, texts):
        print(text if chat else start + text)
    return texts


def said(text: str, role: str = "user") -> dict[str, str]:
    """Returns a message of a conversation."""
    return {"role": role, "content": text}


def chat(
    model: Positional[str],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    adapter: str = "",
    cache_dtype: str = "",
) -> None:
    """Answers what is typed, line by line, as it is drawn; an empty line ends it.

    A model with a chat template replies, and remembers the conversation. Any other continues each
    line as a text of its own.

    Args:
      model: a run directory, a Hugging Face directory, a .gguf file, package:NAME, or a hub id.
      max_new_tokens: at most that many tokens each.
      temperature: 0 is greedy.
      top_p: keep the likeliest tokens that hold this probability.
      adapter: a PEFT directory, or a run that trained an adapter, to use with the model.
      cache_dtype: float32, bfloat16 or int8, for keys and values; '' is float32.
    """
    loaded = load(model, adapter=adapter or None)
    room = loaded.model.max_length
    talks = getattr(loaded.tokenizer, "chat_template", None) is not None
    history: list[dict[str, str]] = []
    seed = 0
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        history.append(said(text))
        prompt = history if talks else text
        limit = max_new_tokens
        if room is not None:
            limit = min(limit, room - len(encode(loaded.tokenizer, prompt)))
        if limit < 1:
            raise ValueError(f"what was said fills the {room} places of the model: start anew")
        pieces = []
        options = dict(temperature=temperature, top_p=top_p, seed=seed)
        options["cache_dtype"] = cache_dtype or None
        for piece in stream(loaded, prompt, max_new_tokens=limit, **options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        history.append(said("".join(pieces), "assistant"))
        seed += 1


def classify(model: Positional[str], text: Sequence[str]) -> list[str]:
    """Prints each text's label with its probability.

    Args:
      model: a classifier: a run directory, a Hugging Face directory or a hub id.
      text: texts to classify.
    """
    loaded = load(model)
    length = None
    if (Path(model) / "checkpoints").is_dir():
        # As many places as in training, so that a text is cut where it was cut there.
        length = read_config(model)["experiment"].get("data", {}).get("length")
    found = label_texts(loaded, text, length=length)
    for (label, probabilities), words in zip(found, text):
        print(f"{label}  {probabilities[label]:.3f}  {words}")
    return [label for label, _ in found]


def evaluate(
    model: Positional[str],
    split: str = "validation",
    data: str = "",
    batch_size: int = 32,
    adapter: str = "",
    tasks: str = "",
    limit: int | None = None,
    num_fewshot: int = 0,
) -> dict[str, Any]:
    """Measures a model on a split: loss, perplexity, bits, top-1 reconstruction; or on benchmarks.

    Of a classifier's run it gives accuracy and macro-F1, beside baselines.

    Args:
      model: a run directory; or another model, with `data`.
      split: train, validation or test.
      data: another text: headlines, text:PATH or tfds:NAME; '' is what the run was trained on.
      batch_size: rows of a batch.
      adapter: a PEFT directory, or a run that trained an adapter, to use with the model.
      tasks: benchmarks instead of a split, with commas between: lambada, hellaswag, arc_easy,
        arc_challenge, piqa, winogrande, boolq, sciq, sst2, copa.
      limit: only the first so many items of each benchmark.
      num_fewshot: examples before each question of a benchmark.
    """
    names = task_names(tasks, data, limit, num_fewshot) if tasks else []
    loaded = load(model, adapter=adapter or None)
    if names:
        return benchmark(loaded, names, limit, num_fewshot, batch_size)
    if data:
        length = min(256, (loaded.model.max_length or 257) - 1)
        config: Any = TextData(data, length=length)
    elif (Path(model) / "checkpoints").is_dir() and "data" in read_config(model)["experiment"]:
        config = from_json(read_config(model)["experiment"]["data"])
    else:
        raise ValueError(f"{model} was not trained here, so say what to read: --data text:PATH")
    read = config.make(loaded.tokenizer)
    if isinstance(config, LabelledData):
        metrics = classification_report(loaded.model, loaded.params, read, batch_size, split)
    else:
        batches = read.evaluation(split, batch_size)
        metrics = measure(loaded.model, loaded.params, batches, tokenizer=loaded.tokenizer)
    print(json.dumps({"model": model, "split": split, **metrics}, indent=1))
    return metrics
