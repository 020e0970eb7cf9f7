"""PEFT adapter directories, in and out: adapter_config.json and adapter_model.safetensors.

The family's own weight table says which of our kernels is which of their modules. Where one module
holds several kernels (GPT-2's queries, keys and values), theirs has one A for them all, and ours
one each: writing puts unequal ones side by side, and B in blocks; reading gives each kernel a copy.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.core.paths import flatten, unflatten
from lm.interop.directory import read_json, whole_directory, write_json
from lm.interop.loaded import Loaded
from lm.models import adapters, quantized
from lm.models.foreign import Linear, Weight
from lm.models.zoo import family_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# Keys that are read, and keys that say nothing about the function computed.
READ = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
READ += ("use_rslora", "use_dora", "bias", "init_lora_weights")
INERT = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode")
INERT += ("lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision")
INERT += ("runtime_config", "task_type")
# Other ways to start change the base, too, so that the adapter belongs to another one.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
TASKS["ConditionalGeneration"] = "SEQ_2_SEQ_LM"

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Module:
    """One of their linear modules.

    Attributes:
      name: theirs.
      row: of the weight table, which maps its matrix.
      repeat: index into our stacked leaves, or None where they are not stacked.
    """

    name: str
    row: Weight
    repeat: int | None


@dataclasses.dataclass(frozen=True)
class Factors:
    """An adapter of one of their modules: scale A B, with column lengths where it is a DoRA."""

    a_RI: np.ndarray
    b_OR: np.ndarray
    scale: float
    m_O: np.ndarray | None


def save_adapter(loaded: Loaded, path: str | Path, base: str = "") -> Path:
    """Writes the adapter of a model as a directory that `peft.PeftModel.from_pretrained` opens.

    It appears whole or not at all.

    Args:
      loaded: a model whose parameters hold one adapter.
      path: a new directory.
      base: path or hub id of the base, for readers that look for it; '' says nothing.

    Raises:
      ValueError: if no Hugging Face class computes the model, there is no adapter or several, some
        kernels have column lengths and others none, a kernel is none of their modules, or `path`
        exists.
    """
    path = Path(path)
    family = family_of(loaded.model)
    config = family.write_config(loaded.model)
    params = quantized.dequantize(loaded.model, loaded.params)
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}
    paths = adapters.single(flat)
    dora = {"m" in adapters.beside(flat, path) for path in paths}
    if len(dora) > 1:
        raise ValueError("some kernels have lora_m and others none: a PEFT adapter has all or none")
    table = family.weights(loaded.model)
    modules = list(modules_of(table, loaded.model, flat))
    reachable = {ours for module in modules for ours in module.row.paths}
    if lost := sorted(set(paths) - reachable):
        raise ValueError(f"the adapter beside {lost[0]} has no place in a {config['model_type']}")
    found = {module.name: _gather(module, flat) for module in modules}
    factors = {name: each for name, each in found.items() if each is not None}
    every = {name.rpartition(".")[0] for row in table for name in _names(row, flat)}
    tensors = {}
    for name, each in factors.items():
        tensors[f"{PREFIX}{name}{A}"] = each.a_RI
        tensors[f"{PREFIX}{name}{B}"] = each.b_OR
        if each.m_O is not None:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = each.m_O
    (architecture,) = config["architectures"]
    values = {
        "peft_type": "LORA",
        "task_type": next((t for end, t in TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base or None,
        **_sizes(factors),
        "target_modules": _targets(factors.keys(), every),
        "fan_in_fan_out": any(not m.row.layout.transposed for m in modules if m.name in factors),
        "use_dora": dora == {True},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with whole_directory(path) as scratch:
        write_json(scratch / CONFIG, values)
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, scratch / TENSORS, metadata={"format": "pt"})
    return path


def load_adapter(loaded: Loaded, path: str | Path) -> Loaded:
    """Returns a model with the adapter of a PEFT directory beside its kernels.

    Args:
      loaded: the base, without an adapter.
      path: a directory with adapter_config.json and adapter_model.safetensors.

    Raises:
      ValueError: naming a file that is missing or damaged, a config key whose meaning is not
        implemented, a tensor that nothing maps or whose shape is not of this base or of the rank
        that the config says, or a target without tensors.
    """
    path = Path(path)
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError("these parameters hold an adapter already: merge or remove it first")
    config = read_json(path / CONFIG)
    check_config(config)
    tensors = _read_tensors(path / TENSORS)
    flat = flatten(quantized.dequantize(loaded.model, loaded.params))
    modules = list(modules_of(family_of(loaded.model).weights(loaded.model), loaded.model, flat))
    found = collections.defaultdict(dict)
    for module in modules:
        shapes = [flat[ours].shape[module.repeat is not None :] for ours in module.row.paths]
        factors = _take(module, shapes, tensors, config)
        if factors is not None:
            for ours, leaves in zip(module.row.paths, _deal(module, shapes, factors)):
                found[ours][module.repeat] = leaves
    if tensors:
        names = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path / TENSORS} has tensors that nothing in this base maps: {names}")
    if not found:
        raise ValueError(f"{path / TENSORS} holds no adapter")
    new = dict(flatten(loaded.params))
    for ours, repeats in found.items():
        new.update(adapters.leaves_beside(ours, _stack(repeats, flat[ours])))
    return dataclasses.replace(loaded, params=unflatten(new))


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


def modules_of(table: Sequence[Weight], model: Any, flat: Mapping[str, Any]) -> Iterator[Module]:
    """Yields their linear modules whose matrices are kernels of projections of ours."""
    kernels = adapters.kernels(model)
    for row in table:
        if isinstance(row.layout, Linear) and all(path in kernels for path in row.paths):
            stacked = "{}" in row.theirs
            for repeat, name in enumerate(_names(row, flat)):
                yield Module(name.removesuffix(".weight"), row, repeat if stacked else None)


def _names(row: Weight, flat: Mapping[str, Any]) -> list[str]:
    """Returns their names of a row, one for each layer where ours are stacked."""
    return row.names(len(flat[row.paths[0]])) if "{}" in row.theirs else [row.theirs]


def _gather(module: Module, flat: Mapping[str, np.ndarray]) -> Factors | None:
    """Returns the adapter of a module from those of our kernels, or None where there is none."""
    parts, kernels = [], []
    for path in module.row.paths:
        leaves, kernel = adapters.beside(flat, path), flat[path]
        if module.repeat is not None:
            leaves = {name: leaf[module.repeat] for name, leaf in leaves.items()}
            kernel = kernel[module.repeat]
        kernels.append(kernel.reshape(math.prod(kernel.shape[: module.row.layout.num_in]), -1))
        parts.append(_factors(leaves, len(kernels[-1])) if leaves else None)
    given = [part for part in parts if part is not None]
    if not given:
        return None
    first = given[0]
    shared = all(np.array_equal(part.a_RI, first.a_RI) for part in given)
    a_RI = first.a_RI if shared else np.concatenate([part.a_RI for part in given])
    blocks, start = [], 0
    for part, kernel in zip(parts, kernels):
        block_OR = np.zeros((kernel.shape[1], len(a_RI)), np.float32)
        if part is not None:
            stop = start + len(part.a_RI)
            # One module has one scale: the first one's, and the others' are put into B.
            block_OR[:, start:stop] = part.b_OR * np.float32(part.scale / first.scale)
            start = 0 if shared else stop
        blocks.append(block_OR)
    m_O = None
    if first.m_O is not None:
        lengths = [np.linalg.norm(kernel, axis=0) for kernel in kernels]
        m_O = np.concatenate(
            [own if part is None else part.m_O for part, own in zip(parts, lengths)]
        )
    return Factors(a_RI, np.concatenate(blocks), first.scale, m_O)


def _factors(leaves: Mapping[str, np.ndarray], fan_in: int) -> Factors | None:
    """Returns the leaves beside one kernel of one layer without the zeros of a lower rank."""
    scale = float(leaves["scale"])
    a_IR = leaves["a"].reshape(fan_in, -1)
    b_RO = leaves["b"].reshape(a_IR.shape[1], -1)
    used = a_IR.any(axis=0) | b_RO.any(axis=1)
    if scale == 0 or not used.any():
        return None
    m_O = leaves["m"].reshape(-1) if "m" in leaves else None
    return Factors(a_IR.T[used], b_RO.T[:, used], scale, m_O)


def _sizes(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Returns ranks and alphas, the commonest as the rule and the others as exceptions."""
    ranks = {name: len(each.a_RI) for name, each in factors.items()}
    alphas = {name: _number(each.scale * ranks[name]) for name, each in factors.items()}
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


def _targets(names: Collection[str], every: Collection[str]) -> list[str]:
    """Returns endings of names, the shortest that are no endings of the other modules of a model.

    Short ones, since some readers take no whole paths.
    """
    targets = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        targets.add(
            next(e for e in endings if not any(is_target(n, [e]) for n in every if n not in names))
        )
    return sorted(targets)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a config targets a module: by a regular expression of all of it, or by endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _of_module(config: Mapping[str, Any], key: str, pattern_key: str, name: str) -> Any:
    """Returns the rank or alpha of a module: the first exception that fits, or the rule."""
    for pattern, value in (config.get(pattern_key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config[key]


def _take(
    module: Module,
    shapes: Sequence[tuple[int, ...]],
    tensors: dict[str, np.ndarray],
    config: Mapping[str, Any],
) -> Factors | None:
    """Takes the tensors of a module out of `tensors` and returns its adapter, or None."""
    prefix = f"{PREFIX}{module.name}"
    names = [prefix + A, prefix + B] + ([prefix + MAGNITUDE] if config.get("use_dora") else [])
    if not is_target(module.name, config["target_modules"]):
        return None
    for name in names:
        if name not in tensors:
            raise ValueError(f"{CONFIG} targets {module.name}, and {TENSORS} has no {name}")
    rank = _of_module(config, "r", "rank_pattern", module.name)
    alpha = _of_module(config, "lora_alpha", "alpha_pattern", module.name)
    num_in = module.row.layout.num_in
    fan_in = math.prod(shapes[0][:num_in])
    fan_out = sum(math.prod(shape[num_in:]) for shape in shapes)
    expected = [(rank, fan_in), (fan_out, rank), (fan_out,)]
    for name, shape in zip(names, expected):
        if tensors[name].shape != shape:
            raise ValueError(
                f"tensor {name} has shape {tensors[name].shape}, and rank {rank} on this base "
                f"takes {shape}: the adapter is of another base, or its config of another adapter"
            )
    a_RI, b_OR, *m_O = (tensors.pop(name) for name in names)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a_RI, b_OR, scale, m_O[0] if m_O else None)


def _deal(module: Module, shapes: Sequence[tuple[int, ...]], factors: Factors) -> Iterator[Leaves]:
    """Yields what lies beside each of our kernels of a module, in its shape."""
    num_in, rank = module.row.layout.num_in, len(factors.a_RI)
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape[num_in:])
        leaves = {
            "a": factors.a_RI.T.reshape(*shape[:num_in], rank),
            "b": factors.b_OR[start:stop].T.reshape(rank, *shape[num_in:]),
            "scale": np.float32(factors.scale),
        }
        if factors.m_O is not None:
            leaves["m"] = factors.m_O[start:stop].reshape(shape[num_in:])
        yield leaves
        start = stop


def _stack(repeats: Mapping[int | None, Leaves], kernel: Any) -> Leaves:
    """Returns what lies beside a kernel of all layers; those without an adapter get zeros."""
    if None in repeats:
        return repeats[None]
    example = next(iter(repeats.values()))
    num_in = example["a"].ndim - 1
    rank = max(leaves["a"].shape[-1] for leaves in repeats.values())
    full = []
    for repeat in range(kernel.shape[0]):
        leaves = repeats.get(repeat)
        if leaves is None:
            leaves = {name: np.zeros_like(example[name]) for name in ("a", "b", "scale")}
            if "m" in example:
                inputs = tuple(range(num_in))
                leaves["m"] = np.sqrt(np.sum(np.square(kernel[repeat]), axis=inputs))
        missing = rank - leaves["a"].shape[-1]
        widths = [(0, 0)] * num_in + [(0, missing)]
        b_widths = [(0, missing)] + [(0, 0)] * (leaves["b"].ndim - 1)
        full.append(dict(leaves, a=np.pad(leaves["a"], widths), b=np.pad(leaves["b"], b_widths)))
    return {name: np.stack([leaves[name] for leaves in full]) for name in example}


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns name -> fp32 array; ValueError if the file is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; adapters are read from safetensors only")
    try:
        # Only the flax reader knows bfloat16, which numpy has no name for.
        with safe_open(path, framework="flax") as file:
            return {n: np.asarray(file.get_tensor(n), np.float32) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")
