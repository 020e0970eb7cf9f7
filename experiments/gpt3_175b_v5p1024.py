"""GPT-3 175B (Brown et al., 2020) on 1,024 chips of a TPU v5p: a plan, never run.

    lm plan experiments/gpt3_175b_v5p1024.py --topology v5p:8x8x16

The batch is the paper's, 3.2 million tokens in rows of 2,048, to the nearest 256 rows. They are too
few to divide over 1,024 chips, so that four chips share the heads, feed-forward and vocabulary of
theirs. Compiled ahead of time a chip holds 23.2 of 102 GB, and MFU is at most 82 %
(docs/plans/gpt3_175b_v5p1024.md).
Data are random ids: put a corpus in their place to train.
"""

from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families import gpt2
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine

# The published 50,257 and 47 that no text has, so that four chips divide them.
VOCAB_SIZE = 50304


def experiment() -> Experiment:
    """Returns 175 billion parameters, and 1,536 rows of 2,048 a step."""
    return Experiment(
        name="gpt3_175b_v5p1024",
        model=gpt2.gpt2(VOCAB_SIZE, **gpt2.FAMILY.presets["gpt3-175b"]),
        data=RandomIds(50257, 2048),
        optimizer=AdamW(Cosine(0.6e-4, warmup=119), weight_decay=0.1),
        train=TrainConfig(
            steps=95_000,
            batch_size=1536,
            micro_batches=1,
            dtype="bfloat16",
            remat="full",
            attention="splash",
        ),
        mesh=MeshShape(data=1, fsdp=256, tensor=4),
    )
