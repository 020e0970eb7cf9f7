"""This library as a contestant, on the road that its users take."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.inputs import WEIGHTS, batches, requests
from benchmarks.shapes import DTYPES, SHAPES
from benchmarks.worker import Work
from lm.core.runtime import prepare

prepare()

import jax
import numpy as np

from lm.core.batch import Batch
from lm.core.paths import unflatten
from lm.infer.generate import generate_tokens
from lm.infer.serve import Batcher
from lm.interop.hf import load_directory
from lm.models import params as P
from lm.models.adapters import LoRA
from lm.models.zoo import all_families
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.plan import num_bytes
from lm.train.run import Run, means
from lm.train.schedule import Constant

RATE, DECAY, CLIP = 1e-4, 0.1, 1.0


@dataclass(frozen=True)
class Fixed:
    """The batches of a race, as the pipeline would make them: one document a row, no padding.

    Attributes:
      directory: where they are.
    """

    directory: str
    tokenizer = None
    fingerprint = "fixed"

    def make(self) -> "Fixed":
        return self

    def train(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        made = [as_batch(ids) for ids in batches(self.directory)]
        while True:
            yield made[start % len(made)]
            start += 1

    def validation(self, batch_size: int) -> Iterator[Batch]:
        return iter(())


def as_batch(ids: np.ndarray) -> Batch:
    """Returns (B, T + 1) ids as a batch."""
    tokens = np.ascontiguousarray(ids[:, :-1])
    return Batch(
        tokens=tokens,
        targets=np.ascontiguousarray(ids[:, 1:]),
        weights=np.ones(tokens.shape, np.float32),
        segments=np.ones(tokens.shape, np.int32),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy(),
    )


def build(shape: str) -> Any:
    """Returns the model value of a shape."""
    return all_families()[SHAPES[shape].family].build(**SHAPES[shape].arguments)


def read_params(shape: str, inputs: str) -> Any:
    """Returns the parameters that all contestants share."""
    directory = Path(inputs) / WEIGHTS
    if directory.is_dir():
        return load_directory(directory).params
    with np.load(directory.with_suffix(".npz")) as file:
        return unflatten({name: file[name] for name in file})


def read_model(shape: str, inputs: str, dtype: str) -> tuple[Any, Any]:
    """Returns a model and its parameters, stored in a dtype, for decoding."""
    params = read_params(shape, inputs)
    return build(shape), jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, DTYPES[dtype]), params)


def device_peak() -> int:
    """Returns the largest number of bytes that were in use on an accelerator, 0 on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def train(
    shape: str,
    inputs: str,
    dtype: str = "fp32",
    lora: bool = False,
    fresh: bool = False,
    **config: Any,
) -> Work:
    """Trains as `lm train` does: a `Run` of an `Experiment`, each loss read one step late.

    Args:
      shape: a name in `SHAPES`.
      inputs: directory of the weights and batches.
      dtype: compute dtype; parameters and optimizer state are fp32.
      lora: whether an adapter of rank 8 on queries and values trains, alone.
      fresh: whether to draw the parameters instead of reading them.
      config: further fields of `TrainConfig`.
    """
    sizes = SHAPES[shape]
    experiment = Experiment(
        name="benchmark",
        model=build(shape),
        data=Fixed(inputs),
        optimizer=AdamW(Constant(RATE), weight_decay=DECAY, clip_norm=CLIP),
        train=TrainConfig(steps=10**9, batch_size=sizes.batch_size, dtype=DTYPES[dtype], **config),
        adapter=LoRA() if lora else None,
    )
    start = None if fresh else (lambda: read_params(shape, inputs))
    run = Run(experiment, Path(tempfile.mkdtemp(dir=inputs)), params=start)

    def steps(count: int) -> list[float]:
        losses, pending = [], None
        for _ in range(count):
            metrics = run.take_step(next(run.batches))
            if pending is not None:
                losses.append(means(jax.device_get(pending))["loss"])
            pending = metrics
        return [*losses, means(jax.device_get(pending))["loss"]]

    return Work(
        steps,
        {
            "tokens": run.plan.tokens_per_step,
            "flops": run.plan.flops_per_step,
            "peak_flops": run.plan.peak_flops,
            "peak_source": run.plan.peak_source,
            "trained": run.plan.num_trained,
            "state_bytes": run.plan.state_bytes,
            "temporary_bytes": run.plan.cost.temporary_bytes,
            "settings": f"Run of an Experiment, {dtype} over fp32 parameters, AdamW"
            + (", LoRA of rank 8 on q and v" if lora else "")
            + "".join(f", {name} {value}" for name, value in config.items()),
            "device": jax.devices()[0].device_kind,
        },
        device_peak,
    )


def decode(
    shape: str,
    inputs: str,
    dtype: str = "fp32",
    prompt: int = 128,
    cache_dtype: str | None = None,
) -> Work:
    """Decodes greedily by `generate_tokens`, which `lm.generate` calls.

    Args:
      shape, inputs, dtype: as of `train`; parameters are stored in the dtype, too.
      prompt: tokens of every prompt.
      cache_dtype: of keys and values, as of `generate_tokens`.
    """
    model, params = read_model(shape, inputs, dtype)
    ids = batches(inputs)[..., :-1].reshape(-1)
    settings = dict(temperature=0.0, dtype=DTYPES[dtype], cache_dtype=cache_dtype)

    def run(count: int, batch: int, new: int) -> list[list[list[int]]]:
        rows = np.resize(ids, (batch, prompt)).tolist()
        options = dict(max_new_tokens=new, **settings)
        return [generate_tokens(model, params, rows, **options).rows() for _ in range(count)]

    return Work(
        run,
        {
            "settings": f"generate_tokens, parameters and computation in {dtype}"
            + (f", cache in {cache_dtype}" if cache_dtype else ""),
            "parameters": P.count(params),
            "bytes": num_bytes(params),
            "device": jax.devices()[0].device_kind,
        },
        device_peak,
    )


def serve(
    shape: str,
    inputs: str,
    dtype: str,
    count: int,
    prompt: int,
    new: int,
    slots: int,
    cache_dtype: str | None = None,
    static: bool = False,
) -> Work:
    """Continues prompts of different lengths, each by its own number of tokens.

    Args:
      shape, inputs, dtype, cache_dtype: as of `decode`.
      count, prompt, new: as of `benchmarks.inputs.requests`.
      slots: rows that decode together.
      static: whether every `slots` of them are one call of `generate_tokens`, which goes on until
        the longest is done; otherwise rows go on to the next prompt (`Batcher`).
    """
    model, params = read_model(shape, inputs, dtype)
    asked = requests(inputs, count, prompt, new)
    settings = dict(dtype=DTYPES[dtype], cache_dtype=cache_dtype)

    def continuous() -> dict[str, Any]:
        for ids, more in asked:
            batcher.submit(ids, max_new_tokens=more, temperature=0.0)
        done = sorted(batcher.run(), key=lambda one: one.index)
        first = [one.waited + one.first_token for one in done]
        return {"tokens": [one.tokens for one in done], "first": first}

    def in_batches() -> dict[str, Any]:
        began, tokens, first = time.perf_counter(), [], []
        for at in range(0, count, slots):
            part = asked[at : at + slots]
            before = time.perf_counter() - began
            seconds: list[float] = []
            made = generate_tokens(
                model,
                params,
                [ids for ids, _ in part],
                max_new_tokens=max(more for _, more in part),
                temperature=0.0,
                report=lambda speed, seconds=seconds: seconds.append(speed.first_token),
                **settings,
            )
            first += [before + seconds[0]] * len(part)
            tokens += [row[:more] for row, (_, more) in zip(made.rows(), part)]
        return {"tokens": tokens, "first": first}

    if static:
        once, how = in_batches, f"generate_tokens of {slots} prompts at a time"
    else:
        rows = dict(slots=slots, prompt_length=prompt, max_new_tokens=new)
        batcher = Batcher(model, params, **rows, **settings)
        once, how = continuous, f"Batcher of {slots} rows"
    cache = f", cache in {cache_dtype}" if cache_dtype else ""
    return Work(
        lambda count: [once() for _ in range(count)],
        {
            "settings": f"{how}, parameters and computation in {dtype}{cache}",
            "tokens": sum(more for _, more in asked),
            "device": jax.devices()[0].device_kind,
        },
        device_peak,
    )
