"""The peers that decode on torch: transformers' `generate`, and its continuous batching.

As `benchmarks.torches`, it imports no jax.
"""

import time
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

from benchmarks.inputs import batches, requests
from benchmarks.torches import DEVICE, device_peak, open_transformers
from benchmarks.worker import Work


def generate(
    shape: str,
    inputs: str,
    dtype: str,
    prompt: int = 128,
    static: bool = False,
    compile: bool = False,
) -> Work:
    """Decodes greedily by transformers' `generate`.

    Args:
      shape, inputs: as of `transformers`.
      dtype: of parameters and computation.
      prompt: tokens of every prompt.
      static: whether the cache is static, its forward pass compiled by transformers.
      compile: whether the forward pass is compiled by hand.
    """
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = open_transformers(inputs, dtype=stored).eval().to(DEVICE)
    if compile:
        model.forward = torch.compile(model.forward)
    ids = batches(inputs)[..., :-1].reshape(-1)
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(count: int, batch: int, new: int) -> list[list[list[int]]]:
        tokens = torch.from_numpy(np.resize(ids, (batch, prompt))).long().to(DEVICE)
        options: dict[str, Any] = dict(
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **({"cache_implementation": "static"} if static else {}),
        )
        return [model.generate(tokens, **options)[:, prompt:].tolist() for _ in range(count)]

    how = ", static cache" if static else ", dynamic cache"
    how += ", torch.compile" if compile else ""
    facts = facts_of(model, f"transformers generate, {dtype}, sdpa{how}")
    return Work(run, facts, device_peak)


def facts_of(model: torch.nn.Module, settings: str) -> dict[str, Any]:
    """Returns what a report says of a model that decodes."""
    parameters = {id(p): p for p in model.parameters()}.values()
    return {
        "settings": settings,
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }


class FirstToken(StoppingCriteria):
    """Notes when the first token was there, and stops nothing."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def serve(
    shape: str,
    inputs: str,
    dtype: str,
    count: int,
    prompt: int,
    new: int,
    slots: int,
    continuous: bool = False,
) -> Work:
    """Continues prompts of different lengths, each by its own number of tokens.

    Args:
      shape, inputs, dtype: as of `generate`.
      count, prompt, new: as of `benchmarks.inputs.requests`.
      slots: prompts that decode together.
      continuous: whether by transformers' continuous batching; otherwise every `slots` of them are
        one padded call of `generate` with its dynamic cache.
    """
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = open_transformers(inputs, dtype=stored).eval().to(DEVICE)
    asked = requests(inputs, count, prompt, new)
    greedy = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config = greedy

    @torch.inference_mode()
    def in_batches() -> dict[str, Any]:
        began, tokens, first = time.perf_counter(), [], []
        for at in range(0, count, slots):
            part = asked[at : at + slots]
            width = max(len(ids) for ids, _ in part)
            padded = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in part])
            seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part])
            note = FirstToken()
            out = model.generate(
                padded.to(DEVICE),
                attention_mask=seen.to(DEVICE),
                max_new_tokens=max(more for _, more in part),
                stopping_criteria=[note],
            )[:, width:].tolist()
            assert note.at is not None
            first += [note.at - began] * len(part)
            tokens += [row[:more] for row, (_, more) in zip(out, part)]
        return {"tokens": tokens, "first": first}

    @torch.inference_mode()
    def continuously() -> dict[str, Any]:
        config = ContinuousBatchingConfig(max_requests_per_batch=slots)
        began, found = time.perf_counter(), {}
        with model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config, warmup=False
        ) as manager:
            names = [
                manager.add_request(ids, max_new_tokens=more, record_timestamps=True)
                for ids, more in asked
            ]
            while len(found) < count:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended early")
        made = [found[name] for name in names]
        first = [one.timestamps[0] - began for one in made]
        return {"tokens": [one.generated_tokens for one in made], "first": first}

    once = continuously if continuous else in_batches
    how = "continuous batching" if continuous else f"generate of {slots} prompts at a time"
    facts = facts_of(model, f"transformers, {how}, {dtype}, sdpa")
    facts["tokens"] = sum(more for _, more in asked)
    return Work(lambda count: [once() for _ in range(count)], facts, device_peak)
