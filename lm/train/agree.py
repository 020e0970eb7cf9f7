"""What the processes of a run must hold alike before it starts, and when they stop together."""

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lm
from lm.core.config import to_json
from lm.core.distributed import compare
from lm.train.experiment import Experiment
from lm.train.run_dir import git_commit, installed_versions


def check_same_code(experiment: Experiment) -> None:
    """Refuses to start a run whose processes differ in config, code or number of devices.

    Raises:
      ValueError: on every process, naming the first that differs, and in what.
    """
    if jax.process_count() == 1:
        return
    values = {
        "config": digest(to_json(experiment)),
        "commit": str(git_commit()),
        "source": code_version(),
        "versions": digest(installed_versions()),
    }
    compare("run", {f"the hash of the {name}": text for name, text in values.items()})
    check_devices(jax.devices())


def check_same_data(config: Mapping[str, Any], has_checkpoints: bool) -> None:
    """Refuses to start a run whose processes read other data, or see other checkpoints.

    Args:
      config: of `lm.train.run_dir.config_of`.
      has_checkpoints: whether this process sees the directory of checkpoints.

    Raises:
      ValueError: as `check_same_code`.
    """
    if jax.process_count() == 1:
        return
    values = {
        "the data's fingerprint": digest([config["data"], config["labels"]]),
        "the directory of checkpoints": "there" if has_checkpoints else "not there",
    }
    compare("data", values)


def check_devices(devices: Sequence[Any]) -> None:
    """Raises a ValueError if processes have unequal numbers of devices."""
    counts = Counter(device.process_index for device in devices)
    for process, number in counts.items():
        if number != counts[0]:
            raise ValueError(
                f"process 0 has {counts[0]} devices and process {process} has {number}: start "
                "every process with the same number (--devices-per-process of lm launch)"
            )


def digest(value: Any) -> str:
    """Returns a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@cache
def code_version() -> str:
    """Returns a hash of the sources of this package; a commit says nothing of a changed tree."""
    root = Path(str(lm.__file__)).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


class Vote:
    """How processes stop after the same step: each gives the signal it has, and all see one.

    A signal comes to each process at another time, or to one alone, and a process that stopped by
    itself would leave the others waiting in the middle of a step. The vote of a step is taken with
    it, on the devices, and read with its metrics, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self.is_alone = jax.process_count() == 1
        if self.is_alone:
            return
        line = Mesh(np.asarray(jax.devices()), ("device",))
        self.sharding = NamedSharding(line, PartitionSpec("device"))
        self.most = jax.jit(jnp.max, out_shardings=NamedSharding(line, PartitionSpec()))

    def cast(self, name: str) -> Any:
        """Returns the vote of a step, unread: `name` is a signal's, or ''."""
        if self.is_alone:
            return name
        number = np.array([signal.Signals[name].value if name else 0], np.int32)
        shape = (len(self.sharding.mesh.devices),)
        return self.most(jax.make_array_from_callback(shape, self.sharding, lambda _: number))

    def read(self, vote: Any) -> str:
        """Returns the name of a signal that a process has, or ''."""
        if isinstance(vote, str):
            return vote
        number = int(vote)
        return signal.Signals(number).name if number else ""
