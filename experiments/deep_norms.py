"""A deep transformer without warm-up, its norms before its layers or after them.

python experiments/deep_norms.py
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.core.runtime import prepare

if __name__ == "__main__":
    prepare()  # What it settles must be settled before anything imports jax.

import jax  # noqa: E402

from lm.core.batch import Batch  # noqa: E402
from lm.core.mesh import make_mesh  # noqa: E402
from lm.layers.attention import Attention  # noqa: E402
from lm.layers.block import Block, PostNorm, PreNorm  # noqa: E402
from lm.layers.embed import Embed, Entry  # noqa: E402
from lm.layers.head import Head  # noqa: E402
from lm.layers.mlp import MLP  # noqa: E402
from lm.layers.norm import LayerNorm  # noqa: E402
from lm.layers.position import LearnedPositions  # noqa: E402
from lm.models.decoder import Decoder  # noqa: E402
from lm.models.stack import Stack  # noqa: E402
from lm.train.experiment import Experiment, TrainConfig  # noqa: E402
from lm.train.optimizer import AdamW  # noqa: E402
from lm.train.schedule import Constant  # noqa: E402
from lm.train.state import init_state  # noqa: E402
from lm.train.step import jit_step  # noqa: E402

SEEDS = (0, 1, 2)
STEPS, LAYERS, FEATURES, LENGTH, DIGITS = 200, 48, 16, 12, 10
# Name -> wiring and layers; that a shallow one learns shows that the depth is what is wrong.
MODELS = {"pre": (PreNorm, LAYERS), "post": (PostNorm, LAYERS), "post, shallow": (PostNorm, 4)}


@dataclass(frozen=True)
class Counting:
    """Rows that count from a random digit on, in random steps: 3 5 7 9 1 ..."""

    tokenizer = None
    fingerprint = "counting"

    def make(self) -> "Counting":
        return self

    def train(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        while True:
            rng = np.random.default_rng((seed, start))
            first, step = rng.integers(0, DIGITS, (2, batch_size, 1))
            row = ((first + step * np.arange(LENGTH + 1)) % DIGITS).astype(np.int32)
            ones = np.ones((batch_size, LENGTH), np.int32)
            yield Batch(row[:, :-1], row[:, 1:], ones.astype(np.float32), ones)
            start += 1

    def validation(self, batch_size: int) -> Iterator[Batch]:
        yield next(self.train(batch_size, 10**6, 0))


def decoder(wiring: type[PreNorm] | type[PostNorm], num_layers: int) -> Decoder:
    """Returns the model: one block and one initialization, and the wiring alone to choose."""
    attention = Attention(2, FEATURES // 2, qkv_bias=True, out_bias=True)
    block = Block(wiring(attention, LayerNorm()), wiring(MLP(4 * FEATURES), LayerNorm()))
    return Decoder(
        Embed(DIGITS, FEATURES),
        Stack(
            (block,),
            num_layers,
            entry=Entry(LearnedPositions(LENGTH)),
            norm=LayerNorm() if wiring is PreNorm else None,
        ),
        Head(DIGITS),
        max_length=LENGTH,
    )


def experiment(name: str = "pre") -> Experiment:
    """Returns the run of a model by its name in `MODELS`."""
    return Experiment(
        name="deep_norms",
        model=decoder(*MODELS[name]),
        data=Counting(),
        optimizer=AdamW(Constant(2e-3), weight_decay=0.0),
        train=TrainConfig(steps=STEPS, batch_size=32, log_every=10),
    )


def last_loss(name: str, seed: int) -> float:
    """Returns the mean loss of the last 20 steps, in nats; chance is ln 10."""
    run = experiment(name)
    recipe, mesh = run.recipe(), make_mesh(devices=jax.devices()[:1])
    state, step = init_state(recipe, seed, mesh), jit_step(recipe, mesh)
    losses = []
    for batch, _ in zip(run.data.train(run.train.batch_size, seed, 0), range(STEPS)):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return float(np.mean([total / count for total, count in jax.device_get(losses[-20:])]))


def main(file: str = "runs/deep_norms.json") -> None:
    """Prints the losses, seed by seed, and writes them to a file."""
    rows = []
    for seed in SEEDS:
        rows.append({name: last_loss(name, seed) for name in MODELS})
        print(seed, "  ".join(f"{name} {loss:.3f}" for name, loss in rows[-1].items()), flush=True)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
