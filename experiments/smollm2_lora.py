"""SmolLM2-135M-Instruct on instructions, by LoRA: the replies alone train, through its template.

    lm train experiments/smollm2_lora.py
    lm train experiments/smollm2_lora.py --trainable full --run-dir runs/smollm2_full \
        --optimizer.learning-rate.peak 5e-5

Not measured yet.
"""

from lm.data.instructions import InstructionData
from lm.models.adapters import LoRA
from lm.models.families.llama import llama
from lm.ops.rotary import Rotary
from lm.train.experiment import Experiment, TrainConfig
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns 134.5 million frozen weights, and 0.9 million of rank 8 beside those of attention."""
    return Experiment(
        name="smollm2_lora",
        model=llama(
            vocab_size=49152,
            max_length=8192,
            num_features=576,
            num_heads=9,
            num_kv_heads=3,
            num_layers=30,
            mlp_features=1536,
            rotary=Rotary(100_000.0),
            tied=True,
        ),
        init_from="package:smollm2-135m-instruct",
        adapter=LoRA(
            rank=8, alpha=16, targets=tuple(f"*/{name}/kernel" for name in ("q", "k", "v", "out"))
        ),
        data=InstructionData("alpaca_en_demo", length=256),
        optimizer=AdamW(Cosine(1e-3, warmup=4), weight_decay=0.0),
        train=TrainConfig(steps=60, batch_size=4, eval_every=60, log_every=10),
    )
