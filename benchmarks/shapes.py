"""What is trained and decoded: presets of a family, a batch and a length, for CPU and GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ShapeName = Literal[
    "tiny", "baby", "baby-llama", "gpt2", "gpt2-gpu", "gpt2-medium", "llama-1.3b", "smoke"
]
Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that it is trained on.

    Attributes:
      family: in `lm.models.zoo`.
      batch_size, length: B and T.
      arguments: of the family's builder.
      about: a line for the report.
    """

    family: str
    batch_size: int
    length: int
    about: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.arguments["vocab_size"]


SMALL = dict(vocab_size=65, max_length=256, num_features=384, num_heads=6, num_layers=6)
GPT2 = dict(vocab_size=50257, max_length=1024, dropout=0.0)

SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        "teeny_gpt",
        64,
        128,
        "teenyGPT as published, post-norm, 1.09M: 4 layers of 32, MLP 4,096 wide",
        dict(vocab_size=29),
    ),
    "baby": Shape("gpt2", 16, 256, "GPT of 6 layers, 384 wide, 10.8M", dict(**SMALL, dropout=0.0)),
    "baby-llama": Shape(
        "llama",
        16,
        256,
        "Llama of 6 layers, 384 wide, 10.7M",
        dict(**SMALL, mlp_features=1024),
    ),
    "gpt2": Shape("gpt2", 4, 512, "GPT-2 124M", GPT2),
    "gpt2-gpu": Shape("gpt2", 32, 1024, "GPT-2 124M", GPT2),
    "gpt2-medium": Shape(
        "gpt2",
        16,
        1024,
        "GPT-2 355M",
        dict(**GPT2, num_features=1024, num_heads=16, num_layers=24),
    ),
    "llama-1.3b": Shape(
        "llama",
        8,
        2048,
        "Llama of 24 layers, 2,048 wide, 1.3B",
        dict(
            vocab_size=32000,
            max_length=2048,
            num_features=2048,
            num_heads=16,
            num_layers=24,
            mlp_features=5504,
        ),
    ),
    # Not a result: whether the commands run.
    "smoke": Shape(
        "llama",
        2,
        32,
        "a model of no size, to try the commands",
        dict(
            vocab_size=61,
            max_length=64,
            num_features=32,
            num_heads=4,
            num_layers=2,
            mlp_features=48,
        ),
    ),
}
