"""Both majors of transformers read what is exported: logits, tokens, chats and generation.

Version 5 is that of the tests. `LM_TRANSFORMERS4` names the interpreter of an environment with
torch and transformers 4.57; CONTRIBUTING.md says how to make one.
"""

import functools
import json
import os
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm.core.context import Context
from lm.core.paths import map_with_path
from lm.data.tokenizer import char_tokenizer, teeny_gpt_tokenizer, train_bpe, train_wordpiece
from lm.interop.hf import save_directory
from lm.interop.loaded import Loaded
from lm.models import params as P
from lm.models.encdec import EncoderDecoder
from lm.models.tasks import for_task
from tests.conformance.harness import FAMILIES, hash_of
from tests.parity.hf import ids, right_padded

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.interop import reader  # noqa: E402
from tests.interop.reader import NEW_TOKENS, read  # noqa: E402

VERSION4 = os.environ.get("LM_TRANSFORMERS4", "")
TEXTS = ["police arrest", "Café ﬁre & Straße 12!", ""]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"


def subwords() -> Any:
    return replace(train_bpe(TEXTS, 270), chat_template=TEMPLATE)


@dataclass(frozen=True)
class Case:
    """A model to export; `arguments` change the tiny one of its family."""

    family: str
    arguments: dict = field(default_factory=dict)
    tokenizer: Any = subwords
    task: str | None = None
    dtype: str = "float32"


GATED = dict(activation="gelu_tanh", tied=False)
CASES = {
    "gpt2": Case("gpt2", tokenizer=teeny_gpt_tokenizer),
    "llama3": Case("llama"),
    "mistral": Case("llama", dict(window=5), lambda: char_tokenizer("acefilnoprst ", "unk")),
    "mamba": Case("mamba"),
    "bert": Case("bert", tokenizer=lambda: train_wordpiece(TEXTS, 80)),
    "t5 1.0": Case("t5"),
    "t5 1.1": Case("t5", GATED),
    "vanilla": Case("vanilla"),
    "bfloat16": Case("llama", dict(tied=True), dtype="bfloat16"),
    "gpt2, sequence": Case("gpt2", task="sequence"),
    "bert, span": Case("bert", task="span"),
    "t5, token": Case("t5", task="token"),
}
QUICK = ("gpt2",)


@functools.cache
def build(name: str) -> Loaded:
    case = CASES[name]
    family, tokenizer = FAMILIES[case.family], case.tokenizer()
    arguments = {**family.tiny, **case.arguments, "vocab_size": tokenizer.vocab_size}
    model = family.build(**arguments)
    if case.task:
        model = for_task(model, case.task, **({"num_labels": 3} if case.task != "span" else {}))
    key = jax.random.key(3)

    def perturb(path, leaf):
        noise = jax.random.normal(jax.random.fold_in(key, hash_of(path)), leaf.shape)
        return (leaf + 0.1 * noise).astype(case.dtype)

    params = jax.jit(lambda: map_with_path(perturb, P.init(model, jax.random.key(0))))()
    return Loaded(model, params, tokenizer, case.dtype)


def write(name: str, folder: Path) -> Loaded:
    """Writes a folder that `read` reads."""
    loaded, case = build(name), CASES[name]
    save_directory(loaded, folder / "model")
    mask = right_padded()
    # Decoders that classify look for the last token that is not this one.
    tokens = np.where(mask, ids(loaded.model.vocab_size), loaded.tokenizer.pad_id)
    arrays = {"input_ids": tokens, "attention_mask": mask}
    if isinstance(loaded.model, EncoderDecoder) and case.task is None:
        arrays["decoder_input_ids"] = ids(loaded.model.vocab_size, (2, 9), seed=1)
    np.savez(folder / "tokens.npz", **arrays)
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    return loaded


def check(case: Case, loaded: Loaded, folder: Path) -> None:
    """Compares what `read` has written with what is computed here."""
    arrays, said = np.load(folder / "tokens.npz"), json.loads((folder / "read.json").read_text())
    theirs = np.stack(list(np.load(folder / "read.npz").values()), -1)
    tokens, mask = arrays["input_ids"], arrays["attention_mask"]
    # Weights in bfloat16, read as they are, and computed with in float32.
    fp32 = replace(loaded, dtype="float32")
    if case.task is None:
        targets = arrays.get("decoder_input_ids")
        ours = np.asarray(fp32.logits(tokens, mask=mask, targets=targets))
        kept, theirs = mask if targets is None else np.ones_like(targets), theirs[..., 0]
    else:
        ours, kept = classify(fp32, tokens, mask), mask
        theirs = theirs if case.task == "span" else theirs[..., 0]
    if ours.ndim == 3:
        ours, theirs = ours[kept == 1], theirs[kept == 1]
    assert np.abs(ours - theirs).max() <= 1e-4

    types = ["token_type_ids"] if case.family == "bert" else []
    assert said["inputs"] == ["attention_mask", "input_ids", *types]
    tokenizer = loaded.tokenizer
    assert said["ids"] == [tokenizer.encode(text) for text in TEXTS]
    if said["special"].get("unk_token") is None:
        assert said["back"] == [tokenizer.decode(ids) for ids in said["ids"]]
    for name in ("pad", "bos", "eos"):
        assert said["special"].get(f"{name}_token") == getattr(tokenizer, name)
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "hi"}]
        assert said["chat"] == tokenizer.apply_chat_template(messages)
    if "generated" in said:
        check_greedy(fp32, said["ids"][0], said["generated"], arrays)


def check_greedy(loaded: Loaded, prompt: list[int], generated: list[int], like) -> None:
    """Each new token is the likeliest after those before it, up to the last or the end token.

    Computed in the shapes of `like`, which are compiled already.
    """
    whole = isinstance(loaded.model, EncoderDecoder)
    start = [loaded.model.start_id] if whole else prompt
    assert generated[: len(start)] == start
    rows = {name: np.zeros_like(array) for name, array in like.items()}
    read, written = prompt if whole else generated, generated[:-1]
    rows["input_ids"][0, : len(read)] = read
    if whole:
        rows["decoder_input_ids"][0, : len(written)] = written
    mask = np.ones_like(rows["attention_mask"])
    mask[0, len(read) :] = 0
    logits = loaded.logits(rows["input_ids"], mask=mask, targets=rows.get("decoder_input_ids"))
    likeliest = np.asarray(logits)[0, len(start) - 1 : len(generated) - 1].argmax(-1).tolist()
    assert likeliest == generated[len(start) :]
    finished = generated[-1] == loaded.tokenizer.eos_id
    assert finished or len(generated) == len(start) + NEW_TOKENS


def classify(loaded: Loaded, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    run = jax.jit(functools.partial(loaded.model.apply, method="classify"))
    return np.asarray(run({"params": loaded.params}, tokens, Context(segments_BT=mask)))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
@pytest.mark.slow
def test_version_5(name, tmp_path):
    loaded = write(name, tmp_path)
    read(tmp_path)
    check(CASES[name], loaded, tmp_path)


@pytest.mark.skipif(not VERSION4, reason="LM_TRANSFORMERS4 names no interpreter")
def test_version_4(tmp_path):
    folders = {name: tmp_path / str(number) for number, name in enumerate(CASES)}
    for folder in folders.values():
        folder.mkdir()
    written = {name: write(name, folder) for name, folder in folders.items()}
    command = [VERSION4, reader.__file__, *map(str, folders.values())]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
    for name, folder in folders.items():
        check(CASES[name], written[name], folder)
