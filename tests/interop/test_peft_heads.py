"""Adapters that bring a classifier's head with them, in and out, against peft itself."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from lm.core.context import Context
from lm.core.paths import flatten, unflatten
from lm.interop.hf import save_directory
from lm.interop.loaded import Loaded
from lm.interop.peft import TENSORS, load_adapter, save_adapter
from lm.interop.peft_config import CONFIG
from lm.models.adapters import LoRA
from lm.models.tasks import for_task, part_of
from tests.conformance.harness import random_params, tiny
from tests.interop.test_peft import edited, without
from tests.models.test_adapters import adapted
from tests.parity import hf

LORA = LoRA(3, targets=("*/q/kernel", "*/v/kernel"))
TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"], "gpt2": ["c_attn"]}
SLOW = pytest.mark.slow
CASES = [
    ("bert", "sequence"),
    *(pytest.param(name, "sequence", marks=SLOW) for name in ("llama", "gpt2", "t5")),
    *(pytest.param(name, "token", marks=SLOW) for name in ("bert", "llama", "t5")),
    *(pytest.param(name, "span", marks=SLOW) for name in ("bert", "gpt2")),
    pytest.param("bert", "choice", marks=SLOW),
]
# Without padding, and with T5's end token last, so that all classes read the last place.
TOKENS = np.maximum(hf.ids(61), 3)
TOKENS[:, -1] = 1


def model_of(name: str, task: str) -> Loaded:
    """Returns the tiny model of a family with the head of a task, every parameter random."""
    model = for_task(tiny(name)[0], task, 3)
    return Loaded(model, random_params(model))


def our_logits(loaded: Loaded) -> np.ndarray:
    apply = jax.jit(partial(loaded.model.apply, method="classify"))
    return np.asarray(apply({"params": loaded.params}, TOKENS, Context()))


@torch.no_grad()
def their_logits(module, task: str) -> np.ndarray:
    ids = torch.from_numpy(TOKENS).long()
    if task == "choice":
        return module(input_ids=ids[None]).logits[0, :, None].numpy()
    out = module(input_ids=ids)
    if task == "span":
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return out.logits.numpy()


def open_class(path):
    (kind,) = json.loads((path / "config.json").read_text())["architectures"]
    return getattr(transformers, kind).from_pretrained(path, pad_token_id=0).eval()


def with_other_head(loaded: Loaded) -> Loaded:
    flat = flatten(loaded.params)
    changed = {p: leaf if part_of(p) != "classifier" else 0.5 - leaf for p, leaf in flat.items()}
    return replace(loaded, params=unflatten(changed))


@pytest.mark.parametrize("name, task", CASES)
def test_a_head_goes_with_its_adapter(name, task, tmp_path):
    """peft's logits are ours on a base with another head; ours on one with another, or with none.

    Also as peft writes it.
    """
    base = model_of(name, task)
    trained = replace(base, params=adapted(base.model, base.params, LORA))
    ours = our_logits(trained)
    module = open_class(save_directory(with_other_head(base), tmp_path / "base"))
    save_adapter(trained, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    found = their_logits(theirs, task)
    np.testing.assert_allclose(found.reshape(ours.shape), ours, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    bases = [with_other_head(base)]
    if task != "choice":
        bases.append(replace(base, model=tiny(name)[0], params=body_of(name, base)))
    for directory in ("adapter", "again"):
        for other in bases:
            assert np.abs(our_logits(base) - ours).max() > 1e-3
            back = load_adapter(other, tmp_path / directory)
            np.testing.assert_allclose(our_logits(back), ours, atol=1e-5)


def body_of(name: str, loaded: Loaded) -> dict:
    """Returns parameters of a family's language model with the body of a classifier."""
    return unflatten(
        {p: flatten(loaded.params).get(p, x) for p, x in flatten(tiny(name)[1]).items()}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=SLOW)])
def test_we_read_what_peft_trains(name, tmp_path):
    """Of a classifier that peft itself put the adapter and its copy of the head on."""
    base = model_of(name, "sequence")
    module = open_class(save_directory(base, tmp_path / "base"))
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS[name])
    theirs = peft.get_peft_model(module, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(base, tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(back), their_logits(theirs, "sequence"), atol=1e-5)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(tmp_path):
    base = model_of("bert", "sequence")
    trained = replace(base, params=adapted(base.model, base.params, LORA))
    save_adapter(trained, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    with pytest.raises(ValueError, match="for the task 'sequence', and its base here for 'token'"):
        load_adapter(model_of("bert", "token"), tmp_path / "a")
    wider = for_task(tiny("bert")[0], "sequence", 4)
    with pytest.raises(ValueError, match=r"classifier.*shape"):
        load_adapter(Loaded(wider, random_params(wider)), tmp_path / "a")
    edited(tmp_path / "a", tensors=lambda tensors: without(tensors, "classifier"))
    plain = Loaded(*tiny("bert"))
    with pytest.raises(ValueError, match=r"'sequence' and has no classifier\.weight"):
        load_adapter(plain, tmp_path / "a")
    edited(tmp_path / "a", modules_to_save=["embeddings"])
    with pytest.raises(ValueError, match="modules_to_save of an adapter names 'embeddings'"):
        load_adapter(base, tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {CONFIG, TENSORS}
