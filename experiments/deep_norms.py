"""A deep transformer without warm-up, its norms before its layers or after them.

    python experiments/deep_norms.py

Three minutes on one core (2026-11-28, jax 0.10.1). Three seeds, lowest and last loss in nats, where
chance is 2.30: norms before 0.20 and 0.20; after 1.77, 2.14, 2.21, and 2.31 in the end: they learn,
and diverge; four layers with norms after 0.19 and 0.20.
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
from matplotlib.figure import Figure  # noqa: E402

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
STEPS, LAYERS, FEATURES, LENGTH, DIGITS = 1000, 12, 16, 12, 10
WINDOW = 50  # Steps of which a loss is the mean.
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
        optimizer=AdamW(Constant(3e-3), weight_decay=0.0),
        train=TrainConfig(steps=STEPS, batch_size=32, log_every=10),
    )


def losses(name: str, seed: int) -> list[float]:
    """Returns the mean loss of every `WINDOW` steps, in nats; chance is ln 10."""
    run = experiment(name)
    recipe, mesh = run.recipe(), make_mesh(devices=jax.devices()[:1])
    state, step = init_state(recipe, seed, mesh), jit_step(recipe, mesh)
    sums = []
    for batch, _ in zip(run.data.train(run.train.batch_size, seed, 0), range(STEPS)):
        state, metrics = step(state, batch)
        sums.append(metrics["loss"])
    each = [total / count for total, count in jax.device_get(sums)]
    return np.reshape(each, (-1, WINDOW)).mean(axis=1).tolist()


def draw(rows: list[dict[str, list[float]]], file: Path) -> None:
    """Draws every curve, a colour for a model, and chance."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    steps = np.arange(WINDOW, STEPS + 1, WINDOW)
    for number, name in enumerate(MODELS):
        for index, row in enumerate(rows):
            axes.plot(steps, row[name], color=f"C{number}", label=name if index == 0 else None)
    axes.axhline(np.log(DIGITS), color="grey", linestyle=":", label="chance")
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.legend()
    axes.figure.savefig(file, dpi=120)


def main(file: str = "runs/deep_norms.json") -> None:
    """Prints the lowest and the last loss, seed by seed; writes all losses, and draws them."""
    rows, path = [], Path(file)
    for seed in SEEDS:
        rows.append({name: losses(name, seed) for name in MODELS})
        ends = (f"{name} {min(row):.2f} {row[-1]:.2f}" for name, row in rows[-1].items())
        print(f"seed {seed}, lowest and last:  {'   '.join(ends)}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
