"""What is run on each worker: it unpacks, installs, starts runs that outlive ssh, tells of them.

Copied to the worker beside the archive and run by the machine's own Python before anything is
installed: standard library, Python 3.8. Nothing here ends with status 255, which gcloud takes for
a lost connection and tries again; what it may try again can be done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NoReturn

UV = "uv==0.13.9"
PYTHON = "3.12"  # What tpu/requirements.lock was resolved for.
REFUSED = 3
BEAT_SECONDS = 15.0
LOOK_SECONDS = 0.2

ROOT = Path.home() / "lm"
ARCHIVE = Path.home() / "lm-tree.tar.gz"
TREE, ENV, RUNS = ROOT / "tree", ROOT / "env", ROOT / "runs"
TREE_NOTE, ENV_NOTE = ROOT / "tree.json", ROOT / "env.json"
RUN_NOTE, END_NOTE, LOG, LOCK = ROOT / "run.json", ROOT / "end.json", ROOT / "log", ROOT / "lock"
# libtpu puts its lock there, and holds the chips through these devices.
TEMP = Path(os.environ.get("LM_TPU_TMP", "/tmp"))
DEVICES = ("/dev/accel", "/dev/vfio/")


def refuse(message: str) -> NoReturn:
    print(f"lm-tpu: {message}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write(path: Path, note: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(note))
    part.replace(path)


def take_lock() -> int | None:
    """Returns a descriptor that holds the lock of a run, or None if one is going on.

    The supervisor and its run inherit the descriptor, so that the lock is held as long as either
    lives, and by nobody after a reboot.
    """
    for _ in range(10):
        descriptor = lock_as(fcntl.LOCK_EX)
        if descriptor is not None or runs_now():
            return descriptor
        time.sleep(LOOK_SECONDS)  # Somebody was just looking.
    return None


def lock_as(kind: int) -> int | None:
    ROOT.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def runs_now() -> bool:
    """Whether a run holds the lock; any number of us may look at a time."""
    descriptor = lock_as(fcntl.LOCK_SH)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def refuse_if_running() -> None:
    if runs_now():
        command = " ".join(read(RUN_NOTE).get("command", []))
        refuse(f"a run is going on here ({command}): follow it with 'logs', or 'stop' it first")


def unpack(args: argparse.Namespace) -> None:
    """Replaces the tree; what runs wrote stays, beside it."""
    refuse_if_running()
    TREE_NOTE.unlink(missing_ok=True)
    fresh = ROOT / "tree.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(fresh, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    RUNS.mkdir(exist_ok=True)
    (fresh / "runs").symlink_to(Path("..") / RUNS.name)
    shutil.rmtree(TREE, ignore_errors=True)
    fresh.rename(TREE)
    write(TREE_NOTE, {"tree": args.tree, "commit": args.commit})
    print(f"unpacked tree {args.tree}")


def install(args: argparse.Namespace) -> None:
    """Makes the environment be what the lock says, and installs the tree into it."""
    refuse_if_running()
    lock = TREE / "tpu" / "requirements.lock"
    want = {"lock": hashlib.sha256(lock.read_bytes()).hexdigest(), "python": PYTHON}
    python = str(ENV / "bin" / "python")
    uv = find_uv()
    if read(ENV_NOTE) != want:
        ENV_NOTE.unlink(missing_ok=True)
        shutil.rmtree(ENV, ignore_errors=True)
        do([*uv, "venv", "--python", PYTHON, str(ENV)])
        do([*uv, "pip", "sync", "--require-hashes", "--python", python, str(lock)])
        write(ENV_NOTE, want)
    quiet = ["--no-deps", "--no-build-isolation", "--editable", str(TREE)]
    do([*uv, "pip", "install", "--python", python, *quiet])
    print(f"installed lock {want['lock'][:16]}")


def find_uv() -> list[str]:
    """Returns how to call uv, which is installed for this user if it is not there.

    The machines' own Python is older than this project takes; uv fetches one that fits.
    """
    if shutil.which("uv"):
        return ["uv"]
    # Newer systems refuse an install for the user without this; older ones do not know it.
    os.environ["PIP_BREAK_SYSTEM_PACKAGES"] = "1"
    do([sys.executable, "-m", "pip", "install", "--quiet", "--user", UV])
    return [sys.executable, "-m", "uv"]


def do(words: list[str]) -> None:
    """Runs a command; refuses with its last lines if it fails."""
    print("+ " + " ".join(words), flush=True)
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        last = " / ".join(done.stdout.strip().splitlines()[-5:])
        refuse(f"{words[0]} ended with status {done.returncode}: {last}")


def start(args: argparse.Namespace) -> None:
    """Starts a run that goes on without ssh."""
    if read(RUN_NOTE).get("id") == args.id:
        print(f"run {args.id} was started before")
        return
    lock = take_lock()
    if lock is None:
        refuse_if_running()
        refuse("another start is going on here")
    tree = read(TREE_NOTE)
    if not tree or not read(ENV_NOTE):
        refuse("nothing is set up here: run 'setup' first")
    if tree["tree"] != args.tree:
        refuse(
            f"tree {tree['tree']} lies here, and the working tree is {args.tree} by now: run "
            "'setup' again"
        )
    clear_lockfiles()
    END_NOTE.unlink(missing_ok=True)
    if LOG.exists():
        LOG.replace(LOG.with_name("log.old"))
    LOG.touch()
    run = {"id": args.id, "command": args.command, "env": dict(e.split("=", 1) for e in args.env)}
    # JAX_PLATFORMS makes jax fail where it has no TPU, and not train on the CPU.
    run["env"] = {"JAX_PLATFORMS": args.platform, "LM_COMMIT": tree["commit"], **run["env"]}
    write(RUN_NOTE, {**run, "tree": args.tree, "started": time.time()})
    with LOG.open("ab") as log:
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "supervise", str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
        )
    print(f"started run {args.id}")


def clear_lockfiles() -> None:
    """Removes what a killed process left of libtpu's lock; refuses if a process has the TPU."""
    holder = holder_of_tpu()
    if holder:
        refuse(f"process {holder} holds the TPU: end it first")
    for path in sorted(TEMP.glob("libtpu_lockfile*")):
        try:
            path.unlink()
        except PermissionError:
            # Another user's, in a folder with the sticky bit.
            subprocess.run(["sudo", "-n", "rm", "-f", str(path)], check=False)
        if path.exists():
            refuse(f"{path} is stale and cannot be removed: sudo rm {path}")
        print(f"removed the stale {path}")


def holder_of_tpu() -> str:
    """Returns number and name of a process that has a TPU device open; '' if none can be seen."""
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end, a file be closed, or both be another user's.
        with contextlib.suppress(OSError):
            for entry in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry).startswith(DEVICES):
                        return f"{folder.name} ({(folder / 'comm').read_text().strip()})"
    return ""


def supervise(args: argparse.Namespace) -> None:
    """Runs the command of run.json and writes down how it ended."""
    run = read(RUN_NOTE)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "VIRTUAL_ENV": str(ENV), **run["env"]}
    env["PATH"] = f"{ENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    name, *words = run["command"]
    try:
        child = subprocess.Popen(
            # By the path that the child will have, and not by that of this process.
            [shutil.which(name, path=env["PATH"]) or name, *words],
            cwd=TREE,
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[args.lock],
        )
    except OSError as error:
        print(f"lm-tpu: {name} cannot be run: {error}", flush=True)
        write(END_NOTE, {"id": run["id"], "status": 127})
        return
    write(RUN_NOTE, {**run, "pid": child.pid})
    status = child.wait()
    kill_group(child.pid)  # Whatever it left behind would hold the TPU.
    stopped = read(END_NOTE).get("stopped", "")
    status = 128 - status if status < 0 else status
    write(END_NOTE, {"id": run["id"], "status": status, "stopped": stopped})


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def stop(args: argparse.Namespace) -> None:
    """Asks the run to end, as Ctrl-C would; kills it after the grace."""
    if not runs_now():
        print("nothing runs")
        return
    deadline = time.monotonic() + 10
    while "pid" not in read(RUN_NOTE) and runs_now() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    run = read(RUN_NOTE)
    write(END_NOTE, {"id": run.get("id"), "stopped": args.why})
    with contextlib.suppress(KeyError, ProcessLookupError):
        os.kill(run["pid"], signal.SIGTERM)
    deadline = time.monotonic() + args.grace
    while runs_now():
        if time.monotonic() > deadline:
            kill_group(run["pid"])
            print(f"killed, since it had not ended after {args.grace:g} s")
            deadline = time.monotonic() + 60
        time.sleep(LOOK_SECONDS)
    print(f"stopped with status {state()['status']}")


def state() -> dict:
    """Returns what lies here and how the run of this worker is: none, running, ended or lost."""
    run, end = read(RUN_NOTE), read(END_NOTE)
    found = {"tree": read(TREE_NOTE).get("tree"), "installed": bool(read(ENV_NOTE))}
    found.update({key: run.get(key) for key in ("id", "command", "started")})
    if not run:
        return {**found, "state": "none", "status": None}
    if runs_now():
        return {**found, "state": "running", "status": None}
    if "status" not in end:
        # The supervisor was killed with its run, or the machine was started anew.
        return {**found, "state": "lost", "status": 137}
    return {**found, "state": "ended", "status": end["status"], "stopped": end.get("stopped")}


def show_state(args: argparse.Namespace) -> None:
    print(json.dumps(state()))


def follow(args: argparse.Namespace) -> None:
    """Prints the log of the run until it ends: '|' before its lines, '#' before our own."""
    if not read(RUN_NOTE):
        refuse("nothing was run here yet")
    with LOG.open(encoding="utf-8", errors="replace", newline="\n") as log:
        lines = sum(1 for _ in log)
        first = max(0, lines - args.last) if args.last is not None else args.first
        log.seek(0)
        for _ in range(first):
            log.readline()
        say(f"#from {first}")
        beat = time.monotonic()
        part = ""
        while True:
            # Looked at before reading, so that what was written last is read.
            now = state()
            while text := log.readline():
                part += text
                if part.endswith("\n"):
                    say("|" + part[:-1])
                    part = ""
            if now["state"] != "running" or args.once:
                break
            if time.monotonic() - beat > BEAT_SECONDS:
                say("#beat")
                beat = time.monotonic()
            time.sleep(LOOK_SECONDS)
        if part:
            say("|" + part)
    if now["state"] == "running":
        say("#running")
    else:
        say(f"#ended {now['status']} {now.get('stopped') or ''}".rstrip())


def say(line: str) -> None:
    print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="lm-worker.py")
    commands = whole.add_subparsers(dest="verb", required=True)
    verbs = {
        name: commands.add_parser(name)
        for name in ("unpack", "install", "start", "supervise", "stop", "state", "follow")
    }
    verbs["unpack"].add_argument("--tree", required=True)
    verbs["unpack"].add_argument("--commit", default="")
    verbs["start"].add_argument("--id", required=True)
    verbs["start"].add_argument("--tree", required=True)
    verbs["start"].add_argument("--platform", default="tpu")
    verbs["start"].add_argument("--env", action="append", default=[])
    verbs["start"].add_argument("command", nargs="+")
    verbs["supervise"].add_argument("lock", type=int)
    verbs["stop"].add_argument("--grace", type=float, default=300.0)
    verbs["stop"].add_argument("--why", default="by hand")
    verbs["follow"].add_argument("--first", type=int, default=0)
    verbs["follow"].add_argument("--last", type=int, default=None)
    verbs["follow"].add_argument("--once", action="store_true")
    return whole


def main(words: list[str] | None = None) -> None:
    args = parser().parse_args(words)
    if args.verb == "state":
        return show_state(args)
    globals()[args.verb](args)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        # Whoever was listening has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
