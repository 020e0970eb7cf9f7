"""GPT-2 124M (Radford et al., 2019) on the 8 chips of a TPU v5e host: a plan, never run.

    lm plan experiments/gpt2_124m_v5e8.py --topology v5e:2x4

The batch is the paper's, 512 rows of 1,024. Every chip holds all parameters and has its own rows,
eight at a time, so that nothing is computed again.
The report is docs/plans/gpt2_124m_v5e8.md. Data are random ids: put a corpus in place to train.
"""

from lm.core.mesh import MeshShape
from lm.data.random_ids import RandomIds
from lm.models.families import gpt2
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns 124 million parameters, and 512 rows of 1,024 a step."""
    return Experiment(
        name="gpt2_124m_v5e8",
        model=gpt2.FAMILY.preset("small"),
        data=RandomIds(50257, 1024),
        optimizer=AdamW(Cosine(6e-4, warmup=700), weight_decay=0.1),
        train=TrainConfig(
            steps=100_000,
            batch_size=512,
            micro_batches=8,
            dtype="bfloat16",
            remat="none",
            attention="splash",
        ),
        mesh=MeshShape(data=8),
    )
