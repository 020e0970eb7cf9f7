"""Llama 3 70B (Grattafiori et al., 2024) on 256 chips of a TPU v5p: a plan, never run.

    lm plan experiments/llama3_70b_v5p256.py --topology v5p:4x8x8

Rows of 8,192, and 8 million tokens a step, as the paper has them for the 405B after its first 252
million tokens; of the 70B it does not say. Compiled ahead of time a chip holds 62.8 of 102 GB, and
MFU is at most 80 % (docs/plans/llama3_70b_v5p256.md).
Data are random ids: put a corpus in their place to train.
"""

from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families import llama
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns 70.6 billion parameters, and 1,024 rows of 8,192 a step."""
    return Experiment(
        name="llama3_70b_v5p256",
        model=llama.FAMILY.preset("llama3-70b"),
        data=RandomIds(128256, 8192),
        optimizer=AdamW(Cosine(1.5e-4, warmup=8000), weight_decay=0.1),
        train=TrainConfig(
            steps=1_800_000,
            batch_size=1024,
            micro_batches=1,
            dtype="bfloat16",
            remat="full",
            attention="splash",
        ),
        mesh=MeshShape(data=1, fsdp=256),
    )
