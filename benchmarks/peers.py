"""Who takes part: NAME, or NAME with ways to run it, 'hf+compile', as contestants of a race.

Ways of ours are fields of `TrainConfig`, 'lm+micro_batches=16', options of its contestant, such as
decoding's 'lm+cache_dtype=int8', or variables of the environment, in capitals:
'lm+XLA_FLAGS=--xla_cpu_enable_fast_math=true'.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Contestant
from benchmarks.shapes import SHAPES

# glibc keeps freed memory, as `lm.core.runtime.prepare` has it; torch's steps gain by it, too.
KEPT_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
}


@dataclass(frozen=True)
class Peer:
    """A peer of a command.

    Attributes:
      make: as of `Contestant`.
      about: for --help.
      families: of the shapes that it can do; () is all.
      options: that it always has.
      ways: what may follow its name after '+', each the option of that name.
    """

    make: str
    about: str
    families: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ways: tuple[str, ...] = ()


HEAP = "plainheap"  # The one way that is a variable, and no option.
TORCH_WAYS = ("compile", "pure", HEAP)

TRAINING = {
    "lm": Peer("benchmarks.ours:train", "this library", ways=(HEAP,)),
    "hf": Peer(
        "benchmarks.torches:transformers",
        "Hugging Face transformers",
        ("gpt2", "llama"),
        ways=TORCH_WAYS,
    ),
    "litgpt": Peer("benchmarks.torches:litgpt", "litgpt", ("llama",), ways=TORCH_WAYS),
    "torch": Peer(
        "benchmarks.torches:encoder", "torch.nn.TransformerEncoder", ("teeny_gpt",), ways=TORCH_WAYS
    ),
}
FINETUNING = {
    "lm": Peer("benchmarks.ours:train", "this library, LoRA", options=(("lora", True),)),
    "lm-full": Peer("benchmarks.ours:train", "this library, everything trains"),
    "peft": Peer(
        "benchmarks.torches:transformers",
        "peft on transformers, LoRA",
        ("gpt2", "llama"),
        (("lora", True),),
        TORCH_WAYS,
    ),
    "hf": TRAINING["hf"],
}
DECODING = {
    "lm": Peer("benchmarks.ours:decode", "this library"),
    "hf": Peer(
        "benchmarks.torch_decode:generate",
        "transformers generate",
        ("gpt2", "llama"),
        ways=("static", "compile", HEAP),
    ),
}
SERVING = {
    "lm": Peer("benchmarks.ours:serve", "this library, continuous batching", ways=("static",)),
    "hf": Peer(
        "benchmarks.torch_decode:serve",
        "transformers",
        ("gpt2", "llama"),
        ways=("continuous", HEAP),
    ),
}
DATA = {
    "lm": TRAINING["lm"],
    "tokenize": Peer("benchmarks.pipeline:tokenize", "a text into token ids"),
    "pack": Peer("benchmarks.pipeline:pack", "documents into rows"),
    "loader": Peer("benchmarks.pipeline:loader", "batches by Grain", options=(("prefetch", 1),)),
}


def contestants(
    peers: Mapping[str, Peer],
    names: Sequence[str],
    shape: str,
    options: Mapping[str, Any],
    pythons: Mapping[str, str],
    caches: Path,
) -> tuple[list[Contestant], list[str]]:
    """Returns those that take part, ours first, and a sentence for each that the shape rules out.

    Args:
      peers: that there are.
      names: those asked for, besides 'lm'; one starting with 'lm+' is ours, run in another way.
      shape: a name in `SHAPES`.
      options: of all.
      pythons: interpreter of a peer, where it is not this one.
      caches: a new directory, so that compilation is always cold.

    Raises:
      ValueError: for a name or a way that there is not.
    """
    found, out = [], []
    for name in dict.fromkeys(["lm", *names]):
        base, *ways = name.split("+")
        if base not in peers:
            raise ValueError(f"there is no peer {base!r} here: choose from {', '.join(peers)}")
        peer = peers[base]
        family = SHAPES[shape].family
        if peer.families and family not in peer.families:
            out.append(f"{name} is left out: {peer.about} has no {family}")
            continue
        found.append(contestant(name, peer, ways, options, pythons.get(base, ""), caches))
    return found, out


def contestant(
    name: str,
    peer: Peer,
    ways: Iterable[str],
    options: Mapping[str, Any],
    python: str,
    caches: Path,
) -> Contestant:
    """Returns one that takes part; arguments and errors as of `contestants`."""
    chosen: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for way in ways:
        key, _, value = way.partition("=")
        ours = value and peer.make.startswith(("benchmarks.ours:", "benchmarks.pipeline:"))
        if not ours and way not in peer.ways:
            there = ", ".join(peer.ways) or "no other"
            raise ValueError(f"{name.split('+')[0]} has no way {way!r} to run: {there}")
        if ours and key.isupper():
            variables[key] = value
        elif way != HEAP:
            chosen[key] = (int(value) if value.isdigit() else value) if value else True
    folder = tempfile.mkdtemp(dir=caches)
    env = {"JAX_COMPILATION_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Several processes share an accelerator; the reservation of one would leave nothing.
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if HEAP in ways:
        env["LM_KEEP_HEAP"] = "0"
    elif "benchmarks.torch" in peer.make:
        env |= KEPT_HEAP
    merged = {**dict(peer.options), **options, **chosen}
    return Contestant(name, peer.make, merged, env | variables, python)


def parse_pythons(pairs: Sequence[str]) -> dict[str, str]:
    """Returns peer -> interpreter of 'PEER=PATH' pairs, and of BENCH_PYTHON_PEER variables.

    Raises:
      ValueError: for a pair that is none, or an interpreter that is not there.
    """
    found = {
        name.removeprefix("BENCH_PYTHON_").lower(): path
        for name, path in os.environ.items()
        if name.startswith("BENCH_PYTHON_")
    }
    for pair in pairs:
        peer, equals, path = pair.partition("=")
        if not equals:
            raise ValueError(
                f"--python takes PEER=PATH, such as litgpt=/env/bin/python, not {pair}"
            )
        found[peer] = path
    for peer, path in found.items():
        if not os.access(path, os.X_OK):
            raise ValueError(f"the interpreter {path} of {peer} is not there, or is no program")
    return found
