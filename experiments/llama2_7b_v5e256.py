"""Llama 2 7B (Touvron et al., 2023) on 256 chips of a TPU v5e: a plan, never run.

    lm plan experiments/llama2_7b_v5e256.py --topology v5e:16x16

The batch is the paper's, 4 million tokens in rows of 4,096, and so are AdamW's numbers. Parameters
are divided over all chips. The report is docs/plans/llama2_7b_v5e256.md.
Data are random ids: put a corpus in their place to train.
"""

from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families import llama
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns 6.7 billion parameters, and 1,024 rows of 4,096 a step."""
    return Experiment(
        name="llama2_7b_v5e256",
        model=llama.FAMILY.preset("llama2-7b"),
        data=RandomIds(32000, 4096),
        optimizer=AdamW(Cosine(3e-4, warmup=2000), weight_decay=0.1, eps=1e-5),
        train=TrainConfig(
            steps=480_000,
            batch_size=1024,
            micro_batches=1,
            dtype="bfloat16",
            remat="full",
            attention="splash",
        ),
        mesh=MeshShape(data=1, fsdp=256),
    )
