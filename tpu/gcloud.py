"""Calls of gcloud: what they say, which failures pass, which are the user's to mend."""

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Echo = Callable[[str], None]

ATTEMPTS = 5
# Before the second attempt; twice as long before each later one.
PAUSE_SECONDS = 2.0
REFUSED = 3  # As tpu/worker.py ends when it refuses.
TIMED_OUT = 124


class TpuError(ValueError):
    """What the user must know or change; the message says it."""


class NotFound(TpuError):
    """There is no such queued resource or machine."""


class Exists(TpuError):
    """What was to be made is there already."""


class Unreachable(TpuError):
    """Something that may pass did not, within the attempts."""


# Part of what gcloud writes -> what it means, in the order in which they are looked for.
KINDS = (
    ("login", ("active account selected", "refreshing your current auth", "eauthentication")),
    ("disabled", ("SERVICE_DISABLED", "has not been used in project", "it is disabled")),
    ("exists", ("ALREADY_EXISTS", "already exists")),
    ("missing", ("NOT_FOUND", "was not found", "does not exist")),
    ("denied", ("PERMISSION_DENIED", "does not have permission")),
    (
        "transient",
        (
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
            "INTERNAL",
            "ABORTED",
            "rateLimitExceeded",
            "Too Many Requests",
            "Service Unavailable",
            "Bad Gateway",
            "Connection reset",
            "Connection refused",
            "onnection timed out",
            "Unable to find the server",
            "exited with return code [255]",
        ),
    ),
)


@dataclass(frozen=True)
class Done:
    """A call that has ended."""

    status: int
    out: str
    err: str

    @property
    def kind(self) -> str:
        """What went wrong: a name of `KINDS`, 'refused', 'other', or '' for nothing."""
        if self.status == 0:
            return ""
        if self.status == REFUSED and self.reason:
            return "refused"
        # A connection that was lost, that said nothing, or that we have cut.
        if self.status in (255, TIMED_OUT) or self.status < 0:
            return "transient"
        found = (kind for kind, parts in KINDS if any(part in self.err for part in parts))
        return next(found, "other")

    @property
    def reason(self) -> str:
        """What a worker refused, or what gcloud gave as the error."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        ours = [line.removeprefix("lm-tpu: ") for line in lines if line.startswith("lm-tpu: ")]
        if ours:
            return " ".join(ours)
        errors = [n for n, line in enumerate(lines) if line.startswith("ERROR:")]
        return " ".join(lines[errors[-1] :] if errors else lines[-3:])


class Gcloud:
    """gcloud, for one project and zone.

    Attributes:
      project, zone: where.
      dry_run: whether commands are printed and not run.
      echo: prints a line.
    """

    def __init__(self, project: str, zone: str, dry_run: bool = False, echo: Echo = print) -> None:
        """Checks that it can be called at all.

        Args:
          project, zone: '' for what the environment or gcloud's own configuration says.
          dry_run: print commands, run none.
          echo: prints a line.

        Raises:
          TpuError: if gcloud is not there, or no project or zone is known.
        """
        self.dry_run, self.echo = dry_run, echo
        self._running: set[subprocess.Popen] = set()
        self._closed = threading.Event()
        if not dry_run and shutil.which("gcloud") is None:
            raise TpuError(
                "gcloud is not on PATH: install the Google Cloud CLI "
                "(https://cloud.google.com/sdk/docs/install), then run gcloud auth login"
            )
        self.project = project or self._configured("core", "project", "my-project")
        self.zone = zone or self._configured("compute", "zone", "us-west4-a")

    def _configured(self, section: str, name: str, example: str) -> str:
        found = os.environ.get(f"CLOUDSDK_{section}_{name}".upper(), "")
        if not found and not self.dry_run:
            # Where nothing is set, gcloud says so on stderr and nothing on stdout.
            words = ["gcloud", "config", "get-value", f"{section}/{name}", "--quiet"]
            found = self._once(words, 60).out.strip()
        if not found:
            raise TpuError(
                f"no {name}: pass --{name} such as {example}, or run gcloud config set "
                f"{section}/{name} {example}"
            )
        return found

    def line(self, *words: str) -> list[str]:
        """Returns a whole command line of `gcloud compute tpus`."""
        where = [f"--project={self.project}", f"--zone={self.zone}", "--quiet"]
        return ["gcloud", "compute", "tpus", *words, *where]

    def run(self, words: Sequence[str], timeout: float, attempts: int = ATTEMPTS) -> str:
        """Runs a command and returns its output, '' in a dry run; tries again what may pass.

        Raises:
          NotFound: if what it names is not there.
          Unreachable: if it failed with something that may pass, as often as it may be tried.
          TpuError: if it failed otherwise.
        """
        if self.dry_run:
            self.echo(shlex.join(words))
            return ""
        for attempt in range(1, attempts + 1):
            done = self._once(words, timeout)
            if not done.kind:
                return done.out
            if done.kind == "exists" and attempt > 1:
                return done.out  # The attempt before had been heard after all.
            if done.kind != "transient":
                raise self._error(words, done)
            if attempt < attempts and not self._closed.is_set():
                pause = PAUSE_SECONDS * 2 ** (attempt - 1)
                again = f"attempt {attempt + 1} of {attempts} in {pause:g} s"
                self.echo(f"{doing(words)}: {done.reason or 'no answer'}; {again}")
                self._closed.wait(pause)
            if self._closed.is_set():
                break
        raise Unreachable(f"{doing(words)} failed {attempts} times; last: {done.reason}")

    def _error(self, words: Sequence[str], done: Done) -> TpuError:
        what = doing(words)
        if done.kind == "login":
            return TpuError(f"{what}: gcloud has no account that works: run gcloud auth login")
        if done.kind == "disabled":
            return TpuError(
                f"{what}: the Cloud TPU API is off in {self.project}: run gcloud services enable "
                f"tpu.googleapis.com --project={self.project}"
            )
        if done.kind == "missing":
            return NotFound(f"{what}: {done.reason}")
        if done.kind == "exists":
            return Exists(f"{what}: {done.reason}")
        if done.kind == "denied":
            return TpuError(f"{what}: {done.reason} (is {self.project} the right project?)")
        if done.kind == "refused":
            return TpuError(done.reason)
        return TpuError(f"{what}: {done.reason or f'ended with status {done.status}'}")

    def _once(self, words: Sequence[str], timeout: float) -> Done:
        with self.popen(words) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                end(process)
                out, err = process.communicate()
                return Done(TIMED_OUT, out, f"{err}\nERROR: no answer within {timeout:g} s")
            finally:
                self._running.discard(process)
        return Done(process.returncode, out, err)

    def popen(self, words: Sequence[str]) -> subprocess.Popen:
        """Starts a command whose output is read by the caller."""
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C is ours to handle: what ssh would make of it is not.
            start_new_session=True,
        )
        self._running.add(process)
        return process

    def close(self) -> None:
        """Ends all calls that go on, and tries none again."""
        self._closed.set()
        for process in list(self._running):
            end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a call and whatever it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(2)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def doing(words: Sequence[str]) -> str:
    """Returns the verb and the object of a command line: 'ssh to pod, worker 3'."""
    verbs = ("create", "describe", "delete", "ssh", "scp")
    verb = next((word for word in words if word in verbs), words[0])
    worker = next((w.partition("=")[2] for w in words if w.startswith("--worker=")), "")
    name = next((w for w in words[words.index(verb) + 1 :] if not w.startswith("-")), "")
    if worker:
        return f"{verb}, worker {worker}"
    return f"{verb} {name}".strip()


def wait(seconds: float) -> None:
    """Sleeps; apart, so that tests need not."""
    time.sleep(seconds)
