"""`lm launch`: the processes of one host, started, watched, and ended together."""

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.commands.supervisor import Job, Limits, say
from lm.core.distributed import FLAGS

USAGE = """usage: lm launch [OPTIONS] -- lm train EXPERIMENT ...

Starts several processes of a command on this host, prints what they print with the process's
number in front, and ends them all where one dies or hangs, saying which. Ctrl-C and SIGTERM are
handed on, so that a run saves and stops.

  --num-processes N         on this host [1]
  --devices-per-process K   K devices for each: CPU devices are made, and of GPUs each has its own
  --hang-seconds S          what no process may stand still for longer than [600]
  --restarts R              start all again so often after a loss; a run goes on [0]
  --log-dir DIR             all output, traces included [logs in the run's directory]

On several hosts the same command runs on each, with the number of the host:

  --num-hosts H --host I    H hosts of N processes each, of which this is number I, from 0
  --coordinator HOST:PORT   an address of host 0 that all reach, and a free port there
  --join-timeout SECONDS    that all have to find each other [300]
"""
OPTIONS = {
    "--num-processes": "1",
    "--devices-per-process": "",
    "--hang-seconds": "600",
    "--restarts": "0",
    "--log-dir": "",
    "--num-hosts": "1",
    "--host": "0",
    "--coordinator": "",
    "--join-timeout": "",
    "--watch-seconds": "30",
}
NUMBERS = [name for name in OPTIONS if name not in ("--log-dir", "--coordinator")]
DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class Layout:
    """Which processes run where.

    Attributes:
      local, hosts, host: processes of a host, hosts, and which host this is.
      coordinator: HOST:PORT; '' for a free port of this host.
      devices: of each process, or None for all it finds.
      join_timeout: seconds, or '' for the default.
    """

    local: int
    hosts: int
    host: int
    coordinator: str
    devices: int | None
    join_timeout: str

    @property
    def ranks(self) -> range:
        """The numbers of this host's processes."""
        return range(self.host * self.local, (self.host + 1) * self.local)

    def environment(self, rank: int, coordinator: str, base: Mapping[str, str]) -> dict[str, str]:
        """Returns the variables of a process."""
        found = dict(base) | {"PYTHONUNBUFFERED": "1"}
        if self.local * self.hosts > 1:
            values = {
                "coordinator": coordinator,
                "num_processes": str(self.local * self.hosts),
                "process_id": str(rank),
                "join_timeout": self.join_timeout,
            }
            found |= {FLAGS[name]: value for name, value in values.items() if value}
        if self.devices is not None:
            found |= device_variables(self.devices, rank - self.ranks.start, base)
        return found


def launch(words: Sequence[str]) -> int:
    """Runs `lm launch`; returns its exit status.

    The status is 0 where all processes ended well, 130 where a signal stopped them, 2 where one
    refused its input, and 1 where one was lost.

    Raises:
      ValueError: for options that cannot be.
    """
    own, command = split(words)
    if not command:
        print(USAGE, end="")
        return 0 if any(word in ("-h", "--help") for word in words) else 2
    layout = layout_of(own)
    logs = Path(own["--log-dir"] or default_logs(command))
    limits = Limits(hang=float(own["--hang-seconds"]), watch=float(own["--watch-seconds"]))
    if command[0] == "lm":
        command = [sys.executable, "-m", "lm.cli", *command[1:]]

    def start() -> Job:
        coordinator = layout.coordinator or f"127.0.0.1:{free_port()}"
        variables = {
            rank: layout.environment(rank, coordinator, os.environ) for rank in layout.ranks
        }
        return Job(command, variables, logs, limits)

    restarts = int(own["--restarts"])
    for attempt in range(restarts + 1):
        status, sentence = start().run()
        if sentence:
            say(sentence)
        if status != 1 or attempt == restarts:
            return status
        say(f"starting all processes again ({attempt + 1} of {restarts})")
    return 1


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the options, with defaults, and the command after them.

    Raises:
      ValueError: for an unknown option, or one without a value, or that takes a number.
    """
    own, words = dict(OPTIONS), list(words)
    options = words[: words.index("--")] if "--" in words else words
    if any(word in ("-h", "--help") for word in options):
        return own, []
    while words and words[0] != "--":
        name, equals, value = words.pop(0).partition("=")
        if name not in OPTIONS:
            raise ValueError(
                f"lm launch has no option {name!r}: it has {', '.join(OPTIONS)}, and the command "
                "comes after --"
            )
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = words.pop(0)
        if name in NUMBERS and not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ValueError(f"{name} takes a number, not {value!r}")
        own[name] = value
    return own, words[1:]


def layout_of(own: Mapping[str, str]) -> Layout:
    """Returns the layout that options ask for; ValueError for one that cannot be."""
    local, hosts, host = (whole(own, name) for name in ("--num-processes", "--num-hosts", "--host"))
    if local < 1 or hosts < 1:
        raise ValueError("--num-processes and --num-hosts are 1 or more")
    if host >= hosts:
        raise ValueError(f"--host counts from 0 to {hosts - 1} on {hosts} hosts, and is {host}")
    if hosts > 1 and not own["--coordinator"]:
        raise ValueError(
            "several hosts need --coordinator HOST:PORT, an address of host 0 that all reach"
        )
    devices = whole(own, "--devices-per-process") if own["--devices-per-process"] else None
    if devices == 0:
        raise ValueError("--devices-per-process is 1 or more")
    timeout = own["--join-timeout"]
    return Layout(local, hosts, host, own["--coordinator"], devices, timeout)


def whole(own: Mapping[str, str], name: str) -> int:
    if not own[name].isdecimal():
        raise ValueError(f"{name} takes a whole number, not {own[name]!r}")
    return int(own[name])


def device_variables(count: int, local: int, base: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that give a process so many devices.

    Args:
      count: of devices.
      local: which process of this host.
      base: variables of all.

    Raises:
      ValueError: if there are fewer GPUs.
    """
    gpus = visible_gpus(base)
    if base.get("JAX_PLATFORMS", "").split(",")[0] == "cpu" or not gpus:
        flags = [
            flag
            for flag in shlex.split(base.get("XLA_FLAGS", ""))
            if not flag.startswith(DEVICE_COUNT)
        ]
        return {"XLA_FLAGS": " ".join([*flags, f"{DEVICE_COUNT}={count}"])}
    mine = gpus[local * count : (local + 1) * count]
    if len(mine) < count:
        raise ValueError(
            f"process {local} of this host would need the GPUs {local * count} to "
            f"{(local + 1) * count - 1}, and there are {len(gpus)}: choose fewer processes, or "
            "fewer devices for each"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def visible_gpus(base: Mapping[str, str]) -> list[str]:
    """Returns the NVIDIA GPUs of this host that processes may use."""
    if "CUDA_VISIBLE_DEVICES" in base:
        return [name for name in base["CUDA_VISIBLE_DEVICES"].split(",") if name]
    found = sorted(Path("/dev").glob("nvidia[0-9]*"), key=lambda path: int(path.name[6:]))
    return [path.name[6:] for path in found]


def free_port() -> int:
    """Returns a port of this host that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def default_logs(command: Sequence[str]) -> Path:
    """Returns where output goes: into the run's directory where the command names one."""
    for word, following in zip(command, [*command[1:], ""]):
        if word == "--run-dir":
            return Path(following).expanduser() / "logs"
        if word.startswith("--run-dir="):
            return Path(word.partition("=")[2]).expanduser() / "logs"
    return Path("runs") / f"logs-{time.strftime('%Y%m%d-%H%M%S')}"
