"""The directory of a run: whose it is, and what made it."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lm.core.config import differences, to_json, with_defaults
from lm.train.experiment import FREE, Experiment
from lm.train.metrics import replace_file
from lm.train.trainable import FULL

CONFIG = "config.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


def config_of(
    experiment: Experiment, fingerprint: str, labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns what is saved with a run: the experiment, its data, and what software made it.

    `labels` are the names of the data's labels, where they have some.
    """
    return {
        "experiment": to_json(experiment),
        "data": fingerprint,
        "labels": list(labels),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "commit": git_commit(),
    }


def check_run_dir(run_dir: Path, config: dict[str, Any]) -> None:
    """Refuses the directory of another run; one that does not exist, or is empty, is free.

    Raises:
      ValueError: naming every field that differs from the config that is there.
    """
    path = run_dir / CONFIG
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file: choose a directory for the run")
    if not path.exists():
        if (run_dir / "checkpoints").exists():
            raise ValueError(f"{run_dir} has checkpoints and no {CONFIG}: choose another directory")
        return
    check_config(run_dir, read_config(run_dir), config)


def check_config(where: Any, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises a ValueError if what lies at `where` was made by another config, or by none."""
    try:
        found = differences(experiment_of(there), here["experiment"])
        found |= differences(there["data"], here["data"], "data's fingerprint")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is not of a run of this package: choose another place"
        ) from error
    wrong = [
        f"{name} is {short(old)} there and {short(new)} here"
        for name, (old, new) in found.items()
        if not any(name == free or name.startswith(f"{free}.") for free in FREE)
    ]
    if wrong:
        raise ValueError(
            f"{where} belongs to a run of another config: {'; '.join(wrong)}. Choose another run "
            "directory, or give the same settings to go on"
        )


def experiment_of(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the experiment of a saved config as it would be saved today."""
    saved = config["experiment"]
    # What a run started from stood beside the experiment once, and before there were adapters the
    # table that trains everything was the default.
    old = {"init_from": config.get("init_from", ""), **saved}
    if "adapter" not in saved and saved.get("trainable") == to_json(FULL):
        old["trainable"] = None
    return with_defaults(old)


def claim_run_dir(run_dir: Path, config: dict[str, Any], tokenizer: Any) -> None:
    """Makes the directory of a run and writes config.json and the tokenizer, if they are not there.

    Raises:
      ValueError: if it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / CONFIG).exists():
            if tokenizer is not None:
                tokenizer.save(run_dir)
            replace_file(run_dir / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"the run directory {run_dir} cannot be written: {error}") from error


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Returns the config that `config_of` made; ValueError if there is none."""
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise ValueError(f"{run_dir} is not the directory of a run: it has no {CONFIG}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def installed_versions() -> dict[str, str]:
    """Returns package -> version of what computes a run."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Returns the commit of the source tree this package runs from, or None if it has none.

    Where the tree was copied without its history, LM_COMMIT says it.
    """
    if told := os.environ.get("LM_COMMIT"):
        return told
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
