"""A JAX/Flax research codebase for language models.

    import lm
    loaded = lm.load("runs/headlines")
    lm.generate(loaded, ["police "], max_new_tokens=40, temperature=0.7)

Names are imported when they are first used, so that `import lm` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "lm.opening",
    "import_model": "lm.leaving",
    "export_model": "lm.leaving",
    "merge_model": "lm.leaving",
    "average_models": "lm.leaving",
    "Loaded": "lm.interop.loaded",
    "generate": "lm.infer.generate",
    "generate_many": "lm.infer.serve",
    "stream": "lm.infer.generate",
    "score": "lm.infer.score",
    "loglikelihood": "lm.infer.score",
    "embed": "lm.infer.score",
    "classify": "lm.infer.classify",
    "evaluate": "lm.eval.perplexity",
    "load_experiment": "lm.train.experiment",
    "prepare": "lm.core.runtime",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
