"""The cloud of these tests: what the fake gcloud is told, and what it was asked."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tpu.fake_gcloud import LEAVING, memory, slot

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def kill_processes_of(folder: Path) -> None:
    """Ends every process whose home lies in a folder: those of the workers there."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            if any(pair.startswith(f"HOME={folder}/".encode()) for pair in environ):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


class Cloud:
    """A folder that is Google, and a folder of commands for PATH."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.bin, self.copies = folder, folder / "bin", copies
        self.bin.mkdir(parents=True)
        # Without site-packages Python starts in half the time, and none of these needs them.
        bare = f"{shlex.quote(sys.executable)} -S"
        for name, what in (("gcloud", HERE / "fake_gcloud.py"), ("uv", HERE / "fake_uv.py")):
            self.add(name, f"{bare} {what}")
        self.add("python3", bare)
        known = {
            "config": {"core/project": "p", "compute/zone": "us-west4-a"},
            "requests": {},
            "faults": [],
            "made": 0,
            "grants": 1000,
        }
        (folder / "memory.json").write_text(json.dumps(known))

    def add(self, name: str, command: str) -> None:
        (self.bin / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (self.bin / name).chmod(0o755)

    def environment(self) -> dict[str, str]:
        """Returns what must be in the environment of `python -m tpu`."""
        return {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.folder),
            "LM_CACHE": str(self.folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }

    def change(self, **settings) -> None:
        with memory(self.folder) as known:
            known.update(settings)

    def fail(self, *match: str, how: str, times: int = 1) -> None:
        """Makes the next calls fail whose words contain all of these."""
        with memory(self.folder) as known:
            known["faults"].append({"match": match, "how": how, "times": times})

    def calls(self, *match: str) -> list[list[str]]:
        """Returns the calls so far that contain all of these words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if all(part in " ".join(call) for part in match)]

    def worker(self, name: str, worker: int) -> Path:
        """Returns the home of a worker, whether or not it is there yet."""
        with memory(self.folder) as known:
            request = known["requests"].get(name, {"number": known["made"]})
        return slot(self.folder, name, request["number"], worker)

    def preempt(self, name: str, node_only: bool = False) -> None:
        """Takes the machines of a slice away."""
        with memory(self.folder) as known:
            request = known["requests"][name]
            if node_only:
                request["node"] = "PREEMPTED"
            else:
                request["states"] = list(LEAVING)
        folder = slot(self.folder, name, request["number"], 0).parent
        kill_processes_of(folder)
        shutil.rmtree(folder)

    def keep_copy(self, name: str) -> None:
        """Keeps what there is, for other tests to begin with."""
        for part in ("machines", "cache"):
            shutil.copytree(self.folder / part, self.copies / name / part, symlinks=True)
        shutil.copy(self.folder / "memory.json", self.copies / name)

    def take_copy(self, name: str) -> bool:
        """Begins with what was kept; returns whether there is any."""
        if not (self.copies / name / "memory.json").exists():
            return False
        shutil.copytree(self.copies / name, self.folder, symlinks=True, dirs_exist_ok=True)
        return True

    def close(self) -> None:
        kill_processes_of(self.folder)


def wait_for(condition, seconds: float = 20.0):
    """Returns what a function gives once it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)
    return found


def make_tree(folder: Path) -> Path:
    """Makes a checkout whose commit and fingerprint are the same everywhere."""
    (folder / "tpu").mkdir(parents=True)
    (folder / "tpu/requirements.lock").write_text("# nothing\n")
    (folder / "hello.txt").write_text("hello\n")
    (folder / ".gitignore").write_text("ignored/\n")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@b", f"GIT_{who}_DATE": "@0 +0000"}
    for line in ("init --quiet", "add --all", "commit --quiet --message one"):
        subprocess.run(["git", *line.split()], cwd=folder, env=env, check=True)
    return folder
