"""PEFT adapter directories, in and out: adapter_config.json and adapter_model.safetensors.

The family's own weight table says which of our kernels is which of their modules. Where one module
holds several kernels (GPT-2's queries, keys and values), theirs has one A for them all, and ours
one each: writing puts unequal ones side by side, and B in blocks; reading gives each kernel a copy.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.core.paths import flatten, unflatten
from lm.interop.directory import read_json, refuse_existing, whole_directory, write_json
from lm.interop.loaded import Loaded
from lm.interop.peft_config import (
    CONFIG,
    UNREACHED,
    base_of,
    check_base,
    check_config,
    is_target,
    of_module,
    sizes,
    targets,
    task_of_class,
)
from lm.interop.peft_whole import check_whole, module_names, take_whole, with_head, write_head
from lm.models import adapters, quantized
from lm.models.foreign import Linear, Weight
from lm.models.tasks import HEAD, part_of
from lm.models.zoo import family_of

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "lm_base"  # In the metadata of our files: what base the adapter is for.
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
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


def is_directory(path: Path) -> bool:
    """Whether `path` holds a PEFT adapter."""
    return (path / CONFIG).is_file()


def save_adapter(loaded: Loaded, path: str | Path, base: str = "") -> Path:
    """Writes the adapter of a model as a directory that `peft.PeftModel.from_pretrained` opens.

    The head of a classifier goes with it, as modules that replace the base's. It appears whole or
    not at all.

    Args:
      loaded: a model whose parameters hold one adapter.
      path: a new directory.
      base: path or hub id of the base, for readers that look for it; '' says nothing.

    Raises:
      ValueError: if no Hugging Face class computes the model, there is no adapter or several, some
        kernels have column lengths and others none, a kernel is none of their modules or of one
        that peft does not reach, or `path` exists.
    """
    path = Path(path)
    refuse_existing(path)
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
    for ending in UNREACHED.get(config["model_type"], ()):
        if name := next((name for name in factors if name.endswith(ending)), None):
            raise ValueError(
                f"peft computes no adapter of {name} in a {config['model_type']}: train one with "
                "other targets, or merge it (lm export --format hf)"
            )
    every = {name.rpartition(".")[0] for row in table for name in _names(row, flat)}
    tensors = {}
    for name, each in factors.items():
        tensors[f"{PREFIX}{name}{A}"] = each.a_RI
        tensors[f"{PREFIX}{name}{B}"] = each.b_OR
        if each.m_O is not None:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = each.m_O
    head = write_head(loaded.model, table, flat)
    if head and (both := [path for path in paths if part_of(path) in HEAD]):
        raise ValueError(
            f"{both[0]} has an adapter and is trained whole: peft takes one of the two"
        )
    tensors |= {f"{PREFIX}{name}": array for name, array in head.items()}
    (architecture,) = config["architectures"]
    values = {
        "peft_type": "LORA",
        "task_type": task_of_class(architecture),
        "base_model_name_or_path": base or None,
        **sizes({name: (len(each.a_RI), each.scale) for name, each in factors.items()}),
        "target_modules": targets(factors.keys(), every),
        "modules_to_save": module_names(head),
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
        metadata = {"format": "pt", BASE: json.dumps(base_of(loaded.model))}
        save_file(contiguous, scratch / TENSORS, metadata=metadata)
    return path


def load_adapter(loaded: Loaded, path: str | Path) -> Loaded:
    """Returns a model with the adapter of a PEFT directory beside its kernels.

    A head that the adapter brings replaces the base's, or stands on a base without one.

    Args:
      loaded: the base, without an adapter.
      path: a directory with adapter_config.json and adapter_model.safetensors.

    Raises:
      ValueError: naming a file that is missing or damaged, a config key whose meaning is not
        implemented, targets that fit no module, a tensor that nothing maps or whose shape is not
        of this base or of the rank that the config says, a target without tensors, or what
        differs between this base and that of an adapter that this package wrote.
    """
    path = Path(path)
    if adapters.adapted(flatten(loaded.params)):
        raise ValueError("these parameters hold an adapter already: merge or remove it first")
    config = read_json(path / CONFIG)
    check_config(config)
    tensors, metadata = _read_tensors(path / TENSORS)
    check_base(json.loads(metadata.get(BASE, "{}")), base_of(loaded.model), path)
    whole = {n.removeprefix(PREFIX): tensors.pop(n) for n in [*tensors] if ".lora_" not in n}
    loaded = with_head(loaded, config.get("task_type"), whole)
    table = family_of(loaded.model).weights(loaded.model)
    flat = flatten(quantized.dequantize(loaded.model, loaded.params))
    named = [*whole]
    heads = take_whole(table, flat, whole)
    check_whole(config.get("modules_to_save"), [name for name in named if name not in whole])
    tensors |= {f"{PREFIX}{name}": array for name, array in whole.items()}
    modules = list(modules_of(table, loaded.model, flat))
    if not any(is_target(module.name, config["target_modules"]) for module in modules):
        raise ValueError(
            f"no module of this base fits target_modules = {config['target_modules']!r} of "
            f"{path / CONFIG}: the adapter is of another base"
        )
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
    new = flatten(loaded.params) | heads
    if lost := [name for name, leaf in new.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ValueError(f"neither this base nor the adapter has {', '.join(lost)}")
    for ours, repeats in found.items():
        new.update(adapters.leaves_beside(ours, _stack(repeats, flat[ours])))
    return dataclasses.replace(loaded, params=unflatten(new))


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
        parts.append(_factors(leaves, kernels[-1]) if leaves else None)
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


def _factors(leaves: Mapping[str, np.ndarray], kernel_IO: np.ndarray) -> Factors | None:
    """Returns the leaves beside one kernel of one layer without the zeros of a lower rank."""
    scale = float(leaves["scale"])
    fan_in, fan_out = kernel_IO.shape
    a_IR = leaves["a"].reshape(fan_in, -1)
    b_RO = leaves["b"].reshape(-1, fan_out)
    m_O = leaves["m"].reshape(-1) if "m" in leaves else None
    used = a_IR.any(axis=0) | b_RO.any(axis=1)
    if scale == 0 or not used.any():
        if m_O is None or np.allclose(m_O, np.linalg.norm(kernel_IO, axis=0), rtol=1e-6):
            return None
        # A DoRA of rank 0 has lengths of columns all the same; theirs has at least rank 1.
        zeros = np.zeros((1, fan_in), np.float32), np.zeros((fan_out, 1), np.float32)
        return Factors(*zeros, 1.0, m_O)
    return Factors(a_IR.T[used], b_RO.T[:, used], scale, m_O)


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
    rank = of_module(config, "r", "rank_pattern", module.name)
    alpha = of_module(config, "lora_alpha", "alpha_pattern", module.name)
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


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns name -> fp32 array, and the metadata; ValueError if missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; adapters are read from safetensors only")
    try:
        # Only the flax reader knows bfloat16, which numpy has no name for.
        with safe_open(path, framework="flax") as file:
            names = file.keys()
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
