"""Keeps a run going: asks for the slice, runs, and after a preemption asks again and resumes."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tpu import gcloud as calls
from tpu.follow import Ending, follow
from tpu.gcloud import NotFound, TpuError, Unreachable
from tpu.slice import Slice, State
from tpu.tree import Tree

# As `lm` ends after bad input, which is as bad the second time.
BAD_INPUT = 2
# Requests in a row that Google gives up before they are granted.
MAX_REQUESTS = 5
MAX_LOOKS = 60


@dataclass(frozen=True)
class Job:
    """What to keep going, and where.

    Attributes:
      command: what every worker runs.
      tree: the files that it runs from.
      platform: 'tpu', or 'cpu' to be without.
      env: NAME=VALUE of its environment.
      spot: whether to ask for a slice that may be taken away.
      runtime: the version of what the machines boot; '' for the type's.
      flags: of gcloud, added to the request.
      restarts: how often to start again on machines that are well.
      poll: seconds between two looks at the slice.
      grace: seconds that a run has to end.
    """

    command: tuple[str, ...]
    tree: Tree
    platform: str
    env: tuple[str, ...]
    spot: bool
    runtime: str
    flags: tuple[str, ...]
    restarts: int
    poll: float
    grace: float


class Watch:
    """A job on a slice, through preemptions."""

    def __init__(self, slice: Slice, job: Job) -> None:
        self.slice, self.job = slice, job
        self.requests = self.failures = self.errors = 0
        self.began = False  # Whether a run was seen to go on: what ended before is not counted.

    def run(self) -> None:
        """Returns once all workers have ended well.

        Raises:
          TpuError: if the run fails on machines that are well, or the slice cannot be had.
        """
        while True:
            state = self._look()
            if state.kind == "ready":
                self.slice.check_type(state)
                self.requests = 0
                if self._on_machines(state):
                    return
            elif state.kind == "missing":
                self._say("asking for the slice")
                self.slice.create(self.job.spot, self.job.runtime, self.job.flags)
            elif state.kind == "waiting":
                self._say(state.detail)
                calls.wait(self.job.poll)
            else:
                self._replace(state)

    def _on_machines(self, state: State) -> bool:
        """Runs on machines that are there; returns whether the run is complete."""
        try:
            if self._finished(state.workers):
                return True
            self.began = True
            endings = follow(
                self.slice,
                list(range(state.workers)),
                poll=self.job.poll,
                usable=self._usable,
                stop_rest=lambda _: self._stop(state.workers),
            )
        except TpuError as error:
            # Machines that are taken away fail in any way there is.
            if self._usable():
                self.errors += 1
                if not isinstance(error, Unreachable) or self.errors > self.job.restarts:
                    raise
            self._say(str(error))
            return False
        self.errors = 0
        if all(ending is not None and ending.status == 0 for ending in endings.values()):
            return True
        self._raise_if_final(endings)
        # A machine that is shut down ends its processes first, and looks well for a while.
        calls.wait(self.job.poll)
        return False

    def _finished(self, workers: int) -> bool:
        """Sees to it that the run goes on; returns whether it is complete."""
        job, slice = self.job, self.slice
        try:
            states = slice.states(workers)
        except Unreachable:
            raise
        except TpuError as error:
            if "nothing is set up" not in str(error):
                raise
            states = [{"state": "none"}] * workers
        ours = all(s.get("command") == list(job.command) for s in states)
        kinds = {s["state"] for s in states}
        if kinds == {"running"}:
            if not ours:
                raise TpuError(f"another run goes on there: python -m tpu stop {slice.name} first")
            self._say("the run goes on")
            return False
        same_tree = all(s.get("tree") == job.tree.fingerprint for s in states)
        if ours and kinds == {"ended"} and all(s["status"] == 0 for s in states):
            return True
        if self.began and ours and same_tree and kinds != {"none"}:
            self._count_failure(states)
        if "running" in kinds:
            self._stop(workers)
        if not same_tree or not all(s.get("installed") for s in states):
            slice.setup(job.tree, workers)
        slice.start(job.command, job.tree, workers, job.platform, job.env)
        return False

    def _count_failure(self, states: list[dict]) -> None:
        endings = {
            n: Ending(s["status"], s.get("stopped") or "")
            for n, s in enumerate(states)
            if s["state"] in ("ended", "lost")
        }
        self._raise_if_final(endings)
        self.failures += 1
        bad = [(bool(e.stopped), worker, e) for worker, e in endings.items() if e.status]
        # The first that failed by itself, and was not stopped since another had.
        _, worker, ending = min(bad, key=lambda item: item[:2], default=(False, 0, Ending(0)))
        if self.failures > self.job.restarts:
            raise TpuError(
                f"worker {worker} of {self.slice.name} {ending}, after {self.job.restarts} "
                f"restarts on the same machines: python -m tpu logs {self.slice.name} shows why"
            )
        self._say(f"worker {worker} {ending}: restart {self.failures} of {self.job.restarts}")

    def _raise_if_final(self, endings: dict[int, Ending | None]) -> None:
        for worker, ending in endings.items():
            if ending is None:
                continue
            if ending.stopped == "by hand":
                raise TpuError(f"the run of {self.slice.name} was stopped by python -m tpu stop")
            if ending.status == BAD_INPUT:
                raise TpuError(
                    f"worker {worker} of {self.slice.name} refused the command (status 2), and "
                    f"would again: python -m tpu logs {self.slice.name} shows why"
                )

    def _stop(self, workers: int) -> None:
        self._say("stopping the workers that are left")
        # What waits for a lost worker cannot save: there is no use in a long grace.
        self.slice.stop(workers, min(self.job.grace, 60.0), "with the others")

    def _usable(self) -> bool:
        return self._look().kind == "ready"

    def _look(self) -> State:
        """Looks at the slice, for as long as it takes if Google cannot be reached from here."""
        for _ in range(MAX_LOOKS):
            try:
                return self.slice.look()
            except Unreachable as error:
                self._say(str(error))
                calls.wait(self.job.poll)
        return self.slice.look()

    def _replace(self, state: State) -> None:
        """Deletes a slice that is of no use any more, and waits until it is gone."""
        self.failures = self.errors = 0
        self.began = False
        if state.detail.startswith("FAILED"):
            self.requests += 1
            if self.requests >= MAX_REQUESTS:
                raise TpuError(
                    f"{self.requests} requests for {self.slice.name} failed, the last with "
                    f"{state.detail}: try another zone or type"
                )
        self._say(f"{state.detail}: deleting it, to ask for another")
        for _ in range(MAX_LOOKS):
            with contextlib.suppress(NotFound):
                self.slice.delete()
            if self._look().kind == "missing":
                return
            calls.wait(self.job.poll)
        raise TpuError(f"{self.slice.name} was to be deleted and is still there")

    def _say(self, line: str) -> None:
        self.slice.gcloud.echo(f"{self.slice.name}: {line}")


def check_resumes(command: Sequence[str]) -> None:
    """Refuses a training run whose checkpoints would go with the machines."""
    if list(command[:2]) != ["lm", "train"]:
        return
    words = [word for part in command for word in part.split("=", 1)]
    where = dict(itertools.pairwise(words)).get("--checkpoint-dir", "")
    if "://" not in where and not where.startswith("/"):
        raise TpuError(
            "what lies on the machines is lost when they are taken away: give lm train "
            "--checkpoint-dir gs://BUCKET/RUN, so that the run can be resumed"
        )
