"""`lm train`, a run from its first step to the report at its end, and `lm plan`."""

import contextlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from lm.core.mesh import make_mesh, num_batch_shards
from lm.core.overrides import apply_overrides, list_fields
from lm.data.instructions import InstructionData, Instructions
from lm.data.labelled import LabelledData
from lm.eval.classification import classification_report
from lm.eval.samples import draw_samples, write_samples
from lm.infer.generate import generate
from lm.infer.rows import encode
from lm.interop.loaded import Loaded
from lm.opening import load, start
from lm.train.ahead import batch_shapes, plan_step, topology_devices
from lm.train.analytic import abstract_mesh, plan_device
from lm.train.experiment import Experiment, load_experiment
from lm.train.loop import Result
from lm.train.loop import train as run_training
from lm.train.metrics import read_metrics
from lm.train.search import HEADER, largest_batches

SAMPLE_TOKENS = 100
NUM_ASKED = 3  # Questions of the test split that a chat model answers at the end.


def train(
    path: str,
    overrides: Sequence[str] = (),
    run_dir: str = "",
    checkpoint_dir: str = "",
    profile: str = "0",
) -> Result:
    """Trains the experiment of a file, then samples from it and compares it with n-grams.

    Args:
      path: `experiments/NAME.py`, or NAME.
      overrides: `--field value` pairs.
      run_dir: where it writes; '' is runs/NAME. The run that is there goes on.
      checkpoint_dir: another place for checkpoints, such as gs://bucket/run; '' for none.
      profile: how many steps to trace into 'profile' in the run's directory.
    """
    if jax.process_index() > 0:
        # Of several processes the first alone speaks; errors of the others go to stderr.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return train_and_report(path, overrides, run_dir, checkpoint_dir, profile)
    return train_and_report(path, overrides, run_dir, checkpoint_dir, profile)


def train_and_report(
    path: str, overrides: Sequence[str], run_dir: str, checkpoint_dir: str, profile: str
) -> Result:
    """Trains as `train` says, whose arguments these are."""
    if not profile.isdecimal():
        raise ValueError(f"--profile takes a number of steps, not {profile!r}")
    experiment = apply_overrides(load_experiment(path), overrides)
    directory = Path(run_dir or Path("runs") / experiment.name)
    result = run_training(
        experiment,
        directory,
        checkpoint_dir=checkpoint_dir or None,
        profile=int(profile),
        **start(experiment),
    )
    is_over = result.stopped in ("finished", "early stopping")
    if is_over and jax.process_count() == 1:
        report(experiment, result, checkpoint_dir)
    again = f"lm train {path}"
    if not is_over:
        then = f"{again} goes on from step {result.step}"
    elif isinstance(experiment.data, LabelledData):
        then = f"lm evaluate {directory} --split test"
    else:
        then = f"lm generate {directory} --prompt '...'"
    print(f"everything is in {directory}; next: {then}")
    return result


def plan(
    path: str,
    overrides: Sequence[str] = (),
    topology: str = "",
    device: str = "",
    largest_batch: str = "",
) -> None:
    """Prints what a step of an experiment costs on hardware that is not here, and its bounds.

    Args:
      path: `experiments/NAME.py`, or NAME.
      overrides: `--field value` pairs.
      topology: a TPU slice to compile for, such as 'v5e:2x2'.
      device: a kind of device to reckon with instead, such as 'h200'.
      largest_batch: 'yes' to search for the largest batch that fits, too.
    """
    if bool(topology) == bool(device):
        raise ValueError(
            "--topology names the slice to plan for, such as v5e:2x2, or --device a kind of "
            "device, such as h200: give one of them"
        )
    experiment = apply_overrides(load_experiment(path), overrides)
    if topology:
        devices = topology_devices(topology)
        plan_of, mesh = partial(plan_step, devices), make_mesh(experiment.mesh, devices)
    else:
        plan_of, mesh = partial(plan_device, device), abstract_mesh(experiment.mesh)
    batch = batch_shapes(experiment, start(experiment).get("tokenizer"))
    print(plan_of(experiment, batch), flush=True)
    if largest_batch:
        unit = num_batch_shards(mesh) * (experiment.train.micro_batches or 1)
        print(HEADER, flush=True)
        with Console().status("") as status:
            for row in largest_batches(experiment, batch, unit, plan_of, tell=status.update):
                print(row, flush=True)


def report(experiment: Experiment, result: Result, checkpoint_dir: str = "") -> None:
    """Prints bits per character beside n-gram models, and ten samples at two temperatures.

    Of a classifier it prints accuracy and macro-F1 beside baselines.
    """
    loaded = load(result.run_dir, checkpoint_dir=checkpoint_dir or None)
    if isinstance(experiment.data, LabelledData):
        data = experiment.data.make(loaded.tokenizer)
        rows = classification_report(loaded.model, loaded.params, data, experiment.train.batch_size)
        print(f"test, {len(data.splits['test']):,} texts     accuracy  macro-F1")
        for name, scores in rows.items():
            print(f"  {name:<24} {scores['accuracy']:.3f}     {scores['macro_f1']:.3f}")
        (result.run_dir / "classification.json").write_text(json.dumps(rows, indent=1) + "\n")
        return
    if isinstance(experiment.data, InstructionData):
        report_replies(loaded, experiment.data.make(loaded.tokenizer), result)
        return
    if result.best_loss is not None and hasattr(experiment.data, "make"):
        data = experiment.data.make(loaded.tokenizer)
        bits = {"this model": data.bits_per_character(result.best_loss), **data.baselines()}
        print("validation, bits per character:")
        for name, value in sorted(bits.items(), key=lambda item: -item[1]):
            print(f"  {name:<12} {value:.3f}")
        (result.run_dir / "bits_per_character.json").write_text(json.dumps(bits, indent=1) + "\n")
    length = loaded.model.max_length
    tokens = SAMPLE_TOKENS if length is None else min(SAMPLE_TOKENS, length - 1)
    samples = draw_samples(loaded, max_new_tokens=tokens, count=10)
    write_samples(result.run_dir / "samples.txt", samples)
    print((result.run_dir / "samples.txt").read_text(), end="")


def report_replies(loaded: Loaded, data: Instructions, result: Result) -> None:
    """Prints the loss of held-out replies before and after, and how the model now answers."""
    records = read_metrics(result.run_dir / "metrics.jsonl")
    losses = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    if losses:
        print("validation, nats per token of the replies:")
        for step, loss in losses.items():
            print(f"  step {step:>6}  {loss:.4f}")
    room = loaded.model.max_length or 2 * SAMPLE_TOKENS
    tokens = min(SAMPLE_TOKENS, room // 2)
    questions = [talk[:1] for talk in data.conversations["test"] if talk[0]["role"] == "user"]
    asked = [q for q in questions if len(encode(loaded.tokenizer, q)) <= room - tokens][:NUM_ASKED]
    if asked:
        replies = generate(loaded, asked, max_new_tokens=tokens, temperature=0)
        lines = [f"> {talk[0]['content']}\n{reply}\n" for talk, reply in zip(asked, replies)]
        (result.run_dir / "samples.txt").write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(lines))


HELP = {
    "train": [
        "usage: lm train EXPERIMENT [--run-dir DIR] [--checkpoint-dir PATH] [--platform NAME]",
        "                [--profile N] [--FIELD VALUE ...]",
        "",
        "Trains experiments/NAME.py (or NAME), or goes on where its run directory stopped.",
        "",
        "  --run-dir DIR          where the run writes [runs/NAME]",
        "  --checkpoint-dir PATH  another place for checkpoints, such as gs://bucket/run",
        "  --platform NAME        cpu, gpu or tpu to insist on",
        "  --profile N            trace N steps, after a few others, for TensorBoard or xprof",
        "  --init-from MODEL      a run, directory, .gguf file or package:NAME to start from",
        "  --trainable full       everything trains, without the experiment's adapter",
        "",
        "By several processes, of which each is told (or by `lm launch`, SLURM, MPI, a TPU slice):",
        "",
        "  --coordinator HOST:PORT, --num-processes N, --process-id I",
        "  --join-timeout SECONDS that they have to find each other [300]",
        "",
    ],
    "plan": [
        "usage: lm plan EXPERIMENT (--topology NAME | --device NAME) [--largest-batch]",
        "               [--FIELD VALUE ...]",
        "",
        "Prints the parameters, memory and FLOPs of a step of experiments/NAME.py (or NAME), and",
        "the bounds of its time, on hardware that need not be here.",
        "",
        "  --topology NAME        a TPU slice, such as v5e:2x2, whose compiler says what the step",
        "                         takes and sends; needs lm[plan]",
        "  --device NAME          by arithmetic alone: a100, a100-80gb, h100, h200, v4, v5e, v5p,",
        "                         v6e, or cpu for this machine; as many as --mesh says",
        "  --largest-batch        also the largest batch that fits, for every remat policy",
        "",
    ],
}


def experiment_help(command: str, path: str = "") -> str:
    """Returns how to call a command, with the fields of an experiment where one is named."""
    lines = list(HELP[command])
    if not path:
        return "\n".join([*lines, f"lm {command} EXPERIMENT --help lists the fields it has."])
    lines.append("Fields, and what they are:")
    for name, value in list_fields(load_experiment(path)):
        lines.append(f"  --{name.replace('_', '-')} {value}")
    return "\n".join(lines)
