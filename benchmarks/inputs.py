"""What all contestants of a race share: weights as a Hugging Face directory, and batches.

    python -m benchmarks.inputs SHAPE DIRECTORY

A process of its own makes them, since the parent of a race stays small. Peers read them with numpy
and safetensors alone.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, Shape

NUM_BATCHES = 8
TOKENS, WEIGHTS = "tokens.npy", "weights"


def make_inputs(name: str, directory: Path) -> None:
    """Writes the inputs of a shape, in a process of their own.

    Raises:
      ValueError: if that fails.
    """
    command = [sys.executable, "-m", "benchmarks.inputs", name, str(directory)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the weights of {name} could not be made: {last}")


def batches(directory: str | Path) -> Any:
    """Returns (NUM_BATCHES, B, T + 1) int32 token ids."""
    import numpy as np

    return np.load(Path(directory) / TOKENS)


def random_tokens(shape: Shape) -> Any:
    """Returns uniformly drawn ids; what they say does not change what a step costs."""
    import numpy as np

    size = NUM_BATCHES, shape.batch_size, shape.length + 1
    return np.random.default_rng(0).integers(0, shape.vocab_size, size).astype(np.int32)


def requests(directory: str | Path, count: int, prompt: int, new: int) -> list[tuple[Any, int]]:
    """Returns prompts of drawn lengths, token ids each, and how many tokens are to follow each.

    Args:
      directory: of the inputs.
      count: how many.
      prompt, new: most tokens of a prompt, and after it; drawn evenly from an eighth of it on.
    """
    import numpy as np

    ids, draw = batches(directory)[..., :-1].reshape(-1), np.random.default_rng(0)
    lengths = draw.integers(max(1, prompt // 8), prompt + 1, count)
    follow = draw.integers(max(2, new // 8), new + 1, count)
    starts = draw.integers(0, max(1, len(ids) - prompt), count)
    return [
        (np.resize(ids[start:], length).tolist(), int(more))
        for start, length, more in zip(starts, lengths, follow)
    ]


def attention_operands(rows: int, length: int) -> list[Any]:
    """Returns (B, T, N, H) fp32 queries, keys, values, and what the outputs are weighed by.

    12 heads of 64, as GPT-2 has.
    """
    import numpy as np

    draw = np.random.default_rng(0).standard_normal
    return [draw((rows, length, 12, 64)).astype(np.float32) for _ in range(4)]


def write(name: str, directory: Path) -> None:
    """Writes fresh parameters and the batches of a shape."""
    import numpy as np

    from lm.core.paths import flatten
    from lm.core.runtime import prepare

    prepare()
    import jax

    from lm.interop.hf import save_directory
    from lm.interop.loaded import Loaded
    from lm.models.zoo import all_families
    from lm.train.state import fresh_params

    shape = SHAPES[name]
    family = all_families()[shape.family]
    model = family.build(**shape.arguments)
    params = jax.device_get(fresh_params(model, seed=0))
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / TOKENS, random_tokens(shape))
    if family.classes:
        save_directory(Loaded(model, params), directory / WEIGHTS)
    else:
        np.savez(directory / WEIGHTS, **flatten(params))


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
