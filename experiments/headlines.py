"""A character-level teenyGPT on real newspaper headlines, in less than five minutes on two cores.

    lm train experiments/headlines.py

MEASURED
"""

from lm.data.corpus import TextData
from lm.models.families.teeny_gpt import teeny_gpt
from lm.ops.rotary import Rotary
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import Muon
from lm.train.schedule import WarmupStableDecay


def experiment() -> Experiment:
    """Returns teenyGPT in wider matrices, with rotary positions: 0.8 million parameters."""
    return Experiment(
        name="headlines",
        model=teeny_gpt(num_features=128, num_heads=2, mlp_multiplier=4, rotary=Rotary(100.0)),
        data=TextData("headlines", "teeny_gpt", length=128, layout="fit"),
        optimizer=Muon(
            WarmupStableDecay(7e-3, warmup=30, decay=950),
            weight_decay=0.0,
            momentum=0.9,
            beta2=0.98,
        ),
        train=TrainConfig(steps=1100, batch_size=16, eval_every=550, log_every=20),
    )
