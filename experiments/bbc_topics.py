"""The topic of a BBC article, by a small decoder from scratch with concat pooling.

    lm train experiments/bbc_topics.py

On the 108 texts of the test split (2026-11-21; one seed; the checkpoint of the smallest validation
loss, step 300 of 400):

    this model               accuracy 0.880   macro-F1 0.860
    tf-idf + logistic                 0.991            0.989
    commonest label                   0.204            0.068

Four minutes on two CPU cores that other programs shared; 96 s of processor time. Words alone tell
these topics apart, and the baseline reads whole articles, the model 128 tokens. The baselines need
`pip install -e '.[eval]'`.
"""

from lm.data.labelled import LabelledData
from lm.layers.pool import Concat, Dense
from lm.models.families.gpt2 import gpt2
from lm.models.tasks import for_task
from lm.train.experiment import Experiment, TrainConfig
from lm.train.objectives import Conditional
from lm.train.optimizer import AdamW
from lm.train.schedule import Cosine


def experiment() -> Experiment:
    """Returns a gpt2-shaped classifier of five topics that reads an article's first 128 tokens."""
    body = gpt2(4096, 128, num_features=64, num_heads=4, num_layers=2, dropout=0.1)
    return Experiment(
        name="bbc_topics",
        model=for_task(body, "sequence", 5, pooler=Dense(Concat(), 64, "relu"), dropout=0.3),
        data=LabelledData("bbc_topics", "bpe:4096", length=128),
        objective=Conditional(),
        optimizer=AdamW(Cosine(2e-3, warmup=40), weight_decay=0.1),
        train=TrainConfig(steps=400, batch_size=32, eval_every=100, log_every=20),
    )
