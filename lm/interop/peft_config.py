"""adapter_config.json: what it may say, how it names modules, and which base an adapter is for."""

import collections
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn

from lm.models.family import IGNORABLE
from lm.models.tasks import task_of
from lm.models.zoo import family_of

CONFIG = "adapter_config.json"
# Keys that are read, and keys that say nothing about the function computed.
READ = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
READ += ("use_rslora", "use_dora", "bias", "init_lora_weights", "modules_to_save", "task_type")
INERT = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode")
INERT += ("lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision")
INERT += ("runtime_config",)
# Other ways to start change the base, too, so that the adapter belongs to another one.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
TASKS |= dict.fromkeys(("ConditionalGeneration", "MTModel"), "SEQ_2_SEQ_LM")
TASKS |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
TASKS |= {"ForQuestionAnswering": "QUESTION_ANS"}
# model_type -> endings of modules that peft refuses, or whose weight the class reads past it.
UNREACHED = {"mamba": ("mixer.out_proj", "mixer.dt_proj")}
# How long a text may be is no question of what the layers compute.
LENGTHS = ("max_position_embeddings", "n_positions")
# Nor does a classifier's body depend on the head, or on the decoder, that went for it.
GONE = ("tie_word_embeddings", "num_decoder_layers")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a config that says anything but plain LoRA, rank-stabilised LoRA or DoRA.

    Raises:
      ValueError: naming the key, and its value.
    """
    wanted = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": STARTS}
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if key not in config:
            raise ValueError(f"{CONFIG} has no {key}: it is not of a LoRA adapter")
    for key, value in config.items():
        if key in wanted and value not in wanted[key]:
            raise ValueError(f"{key} of {CONFIG} is {value!r}, and only {wanted[key]} is read")
        # An empty setting switches off what it names, whatever that is.
        if key not in (*READ, *INERT) and not _empty(value):
            raise ValueError(f"{CONFIG} has {key} = {value!r}, which is not implemented")


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def sizes(scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Returns ranks and alphas, the commonest as the rule and the others as exceptions.

    Args:
      scales: name of a module -> its rank, and what A B is multiplied by.
    """
    ranks = {name: rank for name, (rank, _) in scales.items()}
    alphas = {name: _number(scale * rank) for name, (rank, scale) in scales.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
    }


def _number(value: float) -> int | float:
    """Returns an integer where fp32 cannot tell the value from one."""
    return round(value) if abs(value - round(value)) <= 1e-6 * abs(value) else value


def targets(names: Collection[str], every: Collection[str]) -> list[str]:
    """Returns endings of names, the shortest that are no endings of the other modules of a model.

    Short ones, since some readers take no whole paths.
    """
    found = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found.add(
            next(e for e in endings if not any(is_target(n, [e]) for n in every if n not in names))
        )
    return sorted(found)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a config targets a module: by a regular expression of all of it, or by endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def of_module(config: Mapping[str, Any], key: str, pattern_key: str, name: str) -> Any:
    """Returns the rank or alpha of a module: the first exception that fits, or the rule."""
    for pattern, value in (config.get(pattern_key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config[key]


def task_of_class(name: str) -> str | None:
    """Returns PEFT's name of what a Hugging Face class is for, or None."""
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


def base_of(model: nn.Module) -> dict[str, Any]:
    """Returns what says which function a base computes: the keys of its config that matter.

    Without names, token ids, dropout and the longest length; none where no Hugging Face class
    computes the model. It lies in the metadata of a file of tensors, where peft reads nothing.
    """
    try:
        config = family_of(model).write_config(model)
    except ValueError:
        return {}
    left_out = LENGTHS if task_of(model) is None else (*LENGTHS, *GONE)
    kept = {k: v for k, v in config.items() if not IGNORABLE.fullmatch(k) and k not in left_out}
    return {"model_type": config["model_type"], **json.loads(json.dumps(kept))}


def check_base(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuses an adapter of a base that computes something else.

    Args:
      there: what `base_of` said of the adapter's base.
      here: what it says of this base; a key that one of the two lacks is not compared.
      path: of the adapter.

    Raises:
      ValueError: naming what differs.
    """
    wrong = [
        f"{key} is {value!r} there and {here[key]!r} here"
        for key, value in there.items()
        if key in here and here[key] != value
    ]
    if wrong:
        raise ValueError(f"{path} is an adapter of another base: {'; '.join(wrong[:3])}")
