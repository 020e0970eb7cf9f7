"""A TPU slice by name: asking for it, looking at it, and doing something on all of its workers."""

import json
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tpu import gcloud as calls
from tpu.gcloud import Gcloud, NotFound, TpuError
from tpu.topology import Topology, count
from tpu.tree import Tree, pack

T = TypeVar("T")

# States of a queued resource, and of the node that it becomes, which will change by themselves.
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
COMING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING")
# Of gcloud calls at a time; each is a process of its own.
MAX_CALLS = 32
AGENT, ARCHIVE = "lm-worker.py", "lm-tree.tar.gz"


@dataclass(frozen=True)
class State:
    """How a slice is.

    Attributes:
      kind: 'missing', 'waiting', 'ready', or 'broken', which it will stay until it is deleted.
      detail: what Google calls it.
      accelerator_type: of a slice that is ready.
      workers: of a slice that is ready.
    """

    kind: str
    detail: str
    accelerator_type: str = ""
    workers: int = 0


class Slice:
    """A queued resource and the one node that it becomes, both of the same name.

    Attributes:
      name: of both.
      gcloud: how it is spoken to.
      topology: what was asked for, where it is known.
    """

    def __init__(self, name: str, gcloud: Gcloud, topology: Topology | None = None) -> None:
        self.name, self.gcloud, self.topology = name, gcloud, topology

    def create(self, spot: bool, runtime: str = "", flags: Sequence[str] = ()) -> None:
        """Puts a request for the slice in the queue; TpuError if the name is taken."""
        assert self.topology is not None
        words = self.gcloud.line(
            "queued-resources",
            "create",
            self.name,
            f"--node-id={self.name}",
            f"--accelerator-type={self.topology.accelerator_type}",
            f"--runtime-version={runtime or self.topology.generation.runtime}",
            *["--spot"] * spot,
            *flags,
        )
        self.gcloud.run(words, timeout=300)

    def delete(self) -> None:
        """Deletes the slice and everything on its machines; NotFound if it is not there."""
        words = self.gcloud.line("queued-resources", "delete", self.name, "--force")
        self.gcloud.run(words, timeout=900)

    def look(self) -> State:
        """Asks Google how the slice is."""
        try:
            request = self._describe("queued-resources")
        except NotFound:
            return State("missing", "no such queued resource")
        if self.gcloud.dry_run:
            self._describe("tpu-vm")
            return State("ready", "READY", workers=self.topology.workers if self.topology else 1)
        state = request.get("state", {})
        detail = state.get("state", "unknown")
        if detail in QUEUED:
            return State("waiting", detail)
        if detail != "ACTIVE":
            why = state.get("failedData", {}).get("error", {}).get("message", "")
            return State("broken", f"{detail}: {why}" if why else detail)
        try:
            node = self._describe("tpu-vm")
        except NotFound:
            return State("broken", "ACTIVE, but its machines are gone")
        detail = node.get("state", "unknown")
        if detail in COMING:
            return State("waiting", detail)
        kind = "ready" if detail == "READY" else "broken"
        workers = len(node.get("networkEndpoints", ()))
        return State(kind, detail, node.get("acceleratorType", ""), workers)

    def _describe(self, what: str) -> dict[str, Any]:
        words = self.gcloud.line(what, "describe", self.name, "--format=json")
        return json.loads(self.gcloud.run(words, timeout=90) or "{}")

    def wait_until_ready(self, poll: float) -> State:
        """Waits as long as the queue lasts.

        Raises:
          TpuError: if the request failed, or is gone.
        """
        last = None
        while (state := self.look()).kind == "waiting":
            if state.detail != last:
                self.gcloud.echo(f"{self.name}: {state.detail}")
                last = state.detail
            calls.wait(poll)
        self._say(state.detail)
        if state.kind != "ready":
            raise TpuError(
                f"{self.name} did not become ready ({state.detail}): python -m tpu delete "
                f"{self.name}, then create it again, perhaps in another zone"
            )
        return state

    def ready(self) -> State:
        """Returns the state of a slice that is ready; TpuError if it is anything else."""
        state = self.look()
        if state.kind == "missing":
            raise NotFound(
                f"there is no TPU {self.name!r} in {self.gcloud.project}, {self.gcloud.zone}: "
                f"python -m tpu create {self.name} --type ... makes it; gcloud compute tpus "
                f"queued-resources list --zone={self.gcloud.zone} lists what there is"
            )
        if state.kind == "waiting":
            raise TpuError(
                f"{self.name} is not ready yet ({state.detail}): python -m tpu create waits for it"
            )
        if state.kind == "broken":
            raise TpuError(
                f"{self.name} cannot be used any more ({state.detail}): python -m tpu delete "
                f"{self.name}, then create it again; python -m tpu watch does both"
            )
        return state

    def check_type(self, state: State) -> State:
        """Returns the state of a slice; TpuError if it is of another type than was asked for."""
        asked = self.topology.accelerator_type if self.topology else ""
        if asked and state.accelerator_type not in ("", asked):
            raise TpuError(f"{self.name} is a {state.accelerator_type}, not the {asked} of --type")
        return state

    def on_all(self, workers: int, call: Callable[[int], T]) -> list[T]:
        """Calls a function for every worker at once; returns what it returns.

        Raises:
          TpuError: naming the workers for which it failed.
        """
        with ThreadPoolExecutor(1 if self.gcloud.dry_run else min(workers, MAX_CALLS)) as pool:
            futures = [pool.submit(call, worker) for worker in range(workers)]
            try:
                failed = ((worker, future.exception()) for worker, future in enumerate(futures))
                errors = {worker: error for worker, error in failed if error is not None}
            except KeyboardInterrupt:
                self.gcloud.close()
                raise
        for error in errors.values():
            if not isinstance(error, TpuError):
                raise error
        if errors:
            says = {}
            for worker, error in errors.items():
                says.setdefault(str(error), []).append(str(worker))
            lines = [f"worker {', '.join(who)} of {self.name}: {e}" for e, who in says.items()]
            raise type(next(iter(errors.values())))("; ".join(lines))
        return [future.result() for future in futures]

    def agent_line(self, worker: int, *words: str) -> list[str]:
        """Returns the command line that calls tpu/worker.py on a worker."""
        command = shlex.join(["python3", AGENT, *words])
        return self.gcloud.line(
            "tpu-vm", "ssh", self.name, f"--worker={worker}", f"--command={command}"
        )

    def agent(self, worker: int, *words: str, timeout: float = 120) -> str:
        """Calls tpu/worker.py on a worker; returns what it printed."""
        try:
            return self.gcloud.run(self.agent_line(worker, *words), timeout)
        except TpuError as error:
            if AGENT in str(error) and "No such file" in str(error):
                raise TpuError(f"nothing is set up: python -m tpu setup {self.name}") from error
            raise

    def setup(self, tree: Tree, workers: int) -> None:
        """Copies a tree to all workers, and installs its lock and the tree."""
        folder = cache() / self.name
        if not self.gcloud.dry_run:
            pack(tree, folder / ARCHIVE)
            shutil.copyfile(Path(__file__).with_name("worker.py"), folder / AGENT)
        # The first call of gcloud makes the user's ssh key and sends it to the machines, which
        # many at once would do over each other.
        reach = self.gcloud.line("tpu-vm", "ssh", self.name, "--worker=0", "--command=true")
        self.gcloud.run(reach, timeout=300)
        self._say(f"copying tree {tree.fingerprint}, {len(tree.files)} files")
        files = [str(folder / ARCHIVE), str(folder / AGENT)]
        self.on_all(
            workers,
            lambda worker: self.gcloud.run(
                self.gcloud.line("tpu-vm", "scp", *files, f"{self.name}:", f"--worker={worker}"),
                timeout=1200,
            ),
        )
        unpack = ("unpack", f"--tree={tree.fingerprint}", f"--commit={tree.commit}")
        self.on_all(workers, lambda worker: self.agent(worker, *unpack, timeout=600))
        self._say("installing the lock")
        self.on_all(workers, lambda worker: self.agent(worker, "install", timeout=1800))
        self._say(f"{count(workers, 'worker')} ready to run")

    def start(
        self,
        command: Sequence[str],
        tree: Tree,
        workers: int,
        platform: str = "tpu",
        env: Sequence[str] = (),
    ) -> str:
        """Starts a command on all workers; returns the name of the run."""
        run = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)
        words = ["start", f"--id={run}", f"--tree={tree.fingerprint}", f"--platform={platform}"]
        words += [f"--env={pair}" for pair in env]
        self.on_all(workers, lambda worker: self.agent(worker, *words, "--", *command))
        self._say(f"started on {count(workers, 'worker')}: {shlex.join(command)}")
        return run

    def stop(self, workers: int, grace: float, why: str = "by hand") -> list[str]:
        """Ends the run of all workers; returns what each says."""
        words = ("stop", f"--grace={grace:g}", f"--why={why}")
        return self.on_all(workers, lambda w: self.agent(w, *words, timeout=grace + 120).strip())

    def states(self, workers: int) -> list[dict[str, Any]]:
        """Returns the state of the run of each worker, as tpu/worker.py tells it."""
        said = self.on_all(workers, lambda worker: self.agent(worker, "state"))
        return [json.loads(text.strip().rpartition("\n")[2] or "{}") for text in said]

    def _say(self, line: str) -> None:
        if not self.gcloud.dry_run:
            self.gcloud.echo(f"{self.name}: {line}")


def cache() -> Path:
    """Returns where archives are made: 'tpu' under $LM_CACHE or ~/.cache/lm."""
    ours = os.environ.get("LM_CACHE") or Path.home() / ".cache" / "lm"
    return Path(ours).expanduser() / "tpu"
