"""Several processes as one job: how they find each other, compare what they hold, and leave.

Process 0 is the coordinator; the others connect to it before any of them starts its backend. They
are named by flags, by the variables that `lm launch` sets, or by a cluster that jax knows.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the environment variables of a process are called; the flags are their names in `FLAGS`.
FLAGS = {
    "coordinator": "LM_COORDINATOR",
    "num_processes": "LM_NUM_PROCESSES",
    "process_id": "LM_PROCESS_ID",
    "join_timeout": "LM_JOIN_TIMEOUT",
}
JOIN_SECONDS = 300
# A process that is silent for so long is lost, and the others end. Of jax the default is 100.
HEARTBEAT_SECONDS = 30
# Process 0 draws its plots while the others wait to leave with it.
SHUTDOWN_SECONDS = 300
# Data that one process has in its cache and another must make first.
COMPARE_SECONDS = 3600
REFUSE_SECONDS = 10
LATER_SECONDS = 60


@dataclass(frozen=True)
class Hosts:
    """The processes of a job, and which of them this is.

    Attributes:
      coordinator: HOST:PORT where process 0 listens; '' where the cluster says all of it.
      num_processes: on all hosts together.
      process_id: of this one, from 0.
      join_timeout: seconds that all have to find each other.
    """

    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    join_timeout: int = JOIN_SECONDS


def hosts_from(
    flags: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> Hosts | None:
    """Returns the job that flags or environment variables describe, or None for a process alone.

    Args:
      flags: name of a field of `Hosts` -> text; they go before the variables.
      environment: variables; None takes those of this process.

    Raises:
      ValueError: naming what is missing or cannot be.
    """
    environment = os.environ if environment is None else environment
    given = {name: environment[key] for name, key in FLAGS.items() if environment.get(key)}
    given |= flags
    spelled = {name: f"--{name.replace('_', '-')}" for name in FLAGS}
    for name in ("num_processes", "process_id", "join_timeout"):
        if name in given and not given[name].isdecimal():
            raise ValueError(f"{spelled[name]} takes a number, not {given[name]!r}")
    timeout = int(given.pop("join_timeout", JOIN_SECONDS))
    if not given:
        return Hosts(join_timeout=timeout) if cluster(environment) else None
    if missing := [spelled[name] for name in FLAGS if name not in (*given, "join_timeout")]:
        raise ValueError(
            f"{', '.join(missing)} is missing: --coordinator, --num-processes and --process-id "
            "belong together"
        )
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d+", given["coordinator"]):
        raise ValueError(
            f"--coordinator takes HOST:PORT, such as 10.0.0.2:1234, not {given['coordinator']!r}"
        )
    count, number = int(given["num_processes"]), int(given["process_id"])
    if not number < count:
        raise ValueError(
            f"--process-id counts from 0 and so is less than --num-processes, which is {count}: "
            f"it is {number}"
        )
    return Hosts(given["coordinator"], count, number, timeout)


def cluster(environment: Mapping[str, str]) -> str:
    """Returns which cluster started this process as one of several: 'slurm', 'ompi', 'tpu' or ''.

    One task of SLURM or of MPI is alone. On a TPU VM jax asks the machine's metadata.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    in_step = {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environment)
    if in_step and tasks != "1":
        return "slurm"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "ompi"
    wants_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("", "tpu")
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if wants_tpu and has_chips and not environment.get("TPU_SKIP_MDS_QUERY"):
        return "tpu"
    return ""


def join(hosts: Hosts) -> str:
    """Connects this process with the others; the backend must not have started.

    Returns:
      A line for the plan.

    Raises:
      ValueError: if they do not find each other in time, the coordinator refuses this one, or
        they were not all started for the same number of processes.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The run agrees on when to stop by itself, and its handler of SIGTERM would be replaced.
    jax.config.update("jax_enable_preemption_service", False)
    began = time.monotonic()
    options: dict[str, Any] = dict(
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
    )
    if hosts.coordinator:
        if hosts.process_id > 0:
            wait_for(hosts)
        else:
            check_port(hosts)
        options |= dict(
            coordinator_address=hosts.coordinator,
            num_processes=hosts.num_processes,
            process_id=hosts.process_id,
            cluster_detection_method="deactivate",
        )
    left = max(1, hosts.join_timeout - int(time.monotonic() - began))
    # jax would end the process with a trace at its own time-out, which comes later.
    late = threading.Timer(left, give_up, [hosts])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=left + LATER_SECONDS, **options)
    except Exception as error:  # jax's own, those of the metadata's client, and of sockets.
        if not hosts.coordinator and "coordinator_address should be defined" in str(error):
            return "1"  # A TPU VM that is no part of a slice of several.
        raise ValueError(refusal(hosts, error)) from error
    finally:
        late.cancel()
    state = _state()
    compare("job", {"the number of processes": str(state.num_processes)})
    return f"{state.num_processes}, this is {state.process_id}, coordinator {address(hosts)}"


def wait_for(hosts: Hosts) -> None:
    """Returns once the coordinator listens.

    jax would end the process with a trace if it did not in time.

    Raises:
      ValueError: if it does not in time.
    """
    host, _, port = hosts.coordinator.rpartition(":")
    end = time.monotonic() + hosts.join_timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"process {hosts.process_id} of {hosts.num_processes} could not reach the "
                    f"coordinator at {hosts.coordinator} within {hosts.join_timeout} s ({error}): "
                    "start process 0 there, and check the address and that the port is open "
                    "between the hosts (--join-timeout waits longer)"
                ) from error
        time.sleep(0.2)


def check_port(hosts: Hosts) -> None:
    """Raises a ValueError if process 0 cannot listen where the others will look for it."""
    port = int(hosts.coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ValueError(refusal(hosts, OSError(f"Failed to bind: {error}"))) from error


def give_up(hosts: Hosts) -> None:
    """Ends a process whose others did not come, with one sentence."""
    error = TimeoutError("DEADLINE_EXCEEDED")
    print(f"lm: {refusal(hosts, error)}", file=sys.stderr, flush=True)
    os._exit(2)


def refusal(hosts: Hosts, error: Exception) -> str:
    """Returns one sentence for an error of `jax.distributed.initialize`."""
    text = str(error).strip()
    first = text.splitlines()[0][:200] if text else type(error).__name__
    who = f"process {hosts.process_id} of {hosts.num_processes}"
    if "DEADLINE_EXCEEDED" in text or "timed out" in text.lower():
        return (
            f"not all {hosts.num_processes} processes came to the coordinator at "
            f"{address(hosts)} within {hosts.join_timeout} s: start every process with the same "
            "--coordinator and --num-processes (--join-timeout waits longer)"
        )
    if "nexpected task" in text or "INVALID_ARGUMENT" in text:
        return (
            f"{who} was refused by the coordinator at {address(hosts)}, which was started for "
            f"another number of processes ({first}): give all hosts the same --num-processes"
        )
    if "already in use" in text or "Failed to bind" in text or "Unable to start" in text:
        return (
            f"process 0 cannot listen at {address(hosts)} ({first}): choose another port, or end "
            "the job that has it"
        )
    if "metadata" in text:
        return (
            f"this machine has TPU chips and its metadata does not say of which slice ({first}): "
            "set TPU_SKIP_MDS_QUERY=1 where it is alone, or give --coordinator, --num-processes "
            "and --process-id"
        )
    return f"{who} could not join the others at {address(hosts)}: {first}"


def address(hosts: Hosts) -> str:
    return hosts.coordinator or _state().coordinator_address or "the cluster's address"


def _state() -> Any:
    # jax has no public way to the key-value store that its processes share; Orbax uses this, too.
    from jax._src import distributed

    return distributed.global_state


def is_joined() -> bool:
    """Whether this process is one of several that found each other."""
    return "jax" in sys.modules and _state().client is not None


def compare(name: str, values: Mapping[str, str]) -> None:
    """Refuses processes that do not hold the same; all have to call it, and all refuse.

    Args:
      name: of the comparison, each time another one.
      values: what is compared -> text of this process.

    Raises:
      ValueError: naming the first process that differs from process 0, and in what.
    """
    state = _state()
    if state.client is None:
        return
    own = {"host": socket.gethostname(), "process": str(state.process_id), **values}
    state.client.key_value_set(f"lm/{name}/{state.process_id}", json.dumps(own))

    def read(process: int) -> dict[str, str]:
        wait = 1000 * COMPARE_SECONDS
        return json.loads(state.client.blocking_key_value_get(f"lm/{name}/{process}", wait))

    first = read(0)
    # This one before the others, which may be more than there are if their numbers differ.
    others = itertools.chain([own], map(read, range(1, state.num_processes)))
    for other in others:
        for what in values:
            if first[what] == other[what]:
                continue
            with contextlib.suppress(Exception):
                # Whoever leaves first ends the others with a trace.
                state.client.wait_at_barrier(f"lm/{name}/refused", 1000 * REFUSE_SECONDS)
            raise ValueError(
                f"{what} is not the same everywhere: {first[what]} on process 0 "
                f"({first['host']}) and {other[what]} on process {other['process']} "
                f"({other['host']}); start the same command, with the same code, data and shared "
                "directories, on every host"
            )


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Lets one of several processes end at once after an error.

    At exit jax would wait for the others, which wait for this one in the middle of a step.
    """
    try:
        yield
    except BaseException as error:
        if not is_joined():
            raise
        if isinstance(error, ValueError):
            print(f"lm: {error}", file=sys.stderr)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if _state().process_id == 0:
            time.sleep(1.0)  # With the coordinator the others end at once, with a trace.
        os._exit(status_of(error))


def status_of(error: BaseException) -> int:
    """Returns the exit status after an error: 2 if it is the user's, 130 if interrupted, or 1."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, ValueError) else 1
