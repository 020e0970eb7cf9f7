"""The command `lm`: parses, prepares the process, and calls a function of `lm.commands`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

USAGE = """usage: lm COMMAND ...

  train EXPERIMENT      train experiments/NAME.py, or go on where it stopped
  launch -- lm train EXPERIMENT
                        train by several processes, and watch them
  plan EXPERIMENT       what its step costs on a TPU slice or another device, without one
  generate MODEL        continue prompts
  chat MODEL            talk with a model
  classify MODEL        label texts
  evaluate MODEL        loss, perplexity, bits, top-1 reconstruction; or benchmarks
  import SOURCE RUN     write a pretrained model as a run directory
  export MODEL DIR      write a model as a Hugging Face directory, merged, or as StableHLO
  merge MODEL RUN       write a run with its adapter merged into its kernels
  average MODEL... --out RUN
                        write the weighted mean of checkpoints
  list [FAMILY]         the families, their sizes and parameter counts; or draw one
  data inspect          rows of a data set as text, with masks and statistics
  tokenizer train       train a tokenizer on a text

MODEL is a run directory, a Hugging Face directory, a .gguf file, package:NAME, or a hub id.
`lm COMMAND --help` says more. `lm --version` prints the version.
"""
COMMANDS = {
    ("generate",): "use.generate",
    ("chat",): "use.chat",
    ("classify",): "use.classify",
    ("evaluate",): "use.evaluate",
    ("import",): "models.import_model",
    ("export",): "models.export_model",
    ("merge",): "models.merge_model",
    ("average",): "models.average_models",
    ("list",): "models.list_models",
    ("data", "inspect"): "data.inspect_data",
    ("tokenizer", "train"): "data.train_tokenizer",
}
# Commands of an experiment, whose other options are its fields, and their own options.
OF_EXPERIMENTS = {
    "train": ("--run-dir", "--checkpoint-dir", "--platform", "--profile"),
    "plan": ("--topology", "--device", "--largest-batch"),
}
FLAGS = ("--largest-batch",)  # Those without a value.
# Of a command that several processes run together: see `lm.core.distributed`.
OF_HOSTS = ("--coordinator", "--num-processes", "--process-id", "--join-timeout")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status, 2 after bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from lm import __version__

        print(f"lm {__version__}")
        return 0
    try:
        if words[0] == "launch":
            from lm.commands.launch import launch

            return launch(words[1:])
        if words[0] in OF_EXPERIMENTS:
            return of_experiment(words[0], words[1:])
        for name, function in COMMANDS.items():
            if tuple(words[: len(name)]) == name:
                return call(function, words[len(name) :], "lm " + " ".join(name))
        raise ValueError(unknown(words))
    except ValueError as error:
        print(f"lm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def of_experiment(command: str, words: list[str]) -> int:
    """Runs `lm train` or `lm plan`, whose options beyond their own are fields of the experiment."""
    wants_help = any(word in ("-h", "--help") for word in words)
    path = words[0] if words and not words[0].startswith("-") else ""
    if wants_help or not path:
        from lm.commands.train import experiment_help

        print(experiment_help(command, path))
        return 0 if wants_help else 2
    hosts, words = split_options(words[1:], OF_HOSTS if command == "train" else ())
    own, overrides = split_options(words, OF_EXPERIMENTS[command])
    platform = own.pop("platform", "cpu" if command == "plan" else "")
    from lm.core.distributed import hosts_from, leaving
    from lm.core.runtime import prepare

    with leaving():
        variables = {**os.environ, **({"JAX_PLATFORMS": platform} if platform else {})}
        prepare(platform, hosts=hosts_from(hosts, variables) if command == "train" else None)
        from lm.commands import train

        result = getattr(train, command)(path, overrides, **own)
    return 0 if result is None or result.stopped in ("finished", "early stopping") else 130


def split_options(words: list[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separates the options that a command knows from the fields of the experiment."""
    own, rest = {}, []
    words = list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name not in known:
            rest.append(name + equals + value)
            continue
        if name in FLAGS:
            value = value or "yes"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = words.pop(0)
        own[name[2:].replace("-", "_")] = value
    return own, rest


def call(function: str, words: list[str], prog: str) -> int:
    """Parses the arguments of a function of `lm.commands` with tyro, and calls it."""
    if not any(word in ("-h", "--help") for word in words):
        from lm.core.runtime import prepare

        prepare()
    import tyro

    module, _, name = function.rpartition(".")
    tyro.cli(getattr(importlib.import_module(f"lm.commands.{module}"), name), args=words, prog=prog)
    return 0


def unknown(words: Sequence[str]) -> str:

    names = ["launch", *OF_EXPERIMENTS, *(" ".join(name) for name in COMMANDS)]
    near = difflib.get_close_matches(" ".join(words[:2]), names, 1, cutoff=0.0)
    return f"there is no command {' '.join(words[:2])!r}: did you mean 'lm {near[0]}'?"


if __name__ == "__main__":
    sys.exit(main())
