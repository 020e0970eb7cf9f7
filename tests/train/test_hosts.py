"""Several processes as one job: real ones on this machine, against one process."""

import os
import re
import shutil
import signal
import socket
import time

import pytest

from lm.cli import main
from lm.train.experiment import load_experiment
from lm.train.loop import train
from tests.train.hosts import (
    ROOT,
    assert_same_curve,
    curve,
    finish,
    launch,
    pids,
    read_until,
    start,
    write_experiment,
)

LONG = ("--train.steps", "100000", "--train.eval-every", "0", "--train.checkpoint-every", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def tiny(folder):
    return write_experiment(folder)


@pytest.fixture(scope="module")
def alone(folder, tiny):
    """The run of one process, with eight devices."""
    quietly(tiny, folder / "alone")
    return folder / "alone"


def quietly(file, run_dir) -> None:
    train(load_experiment(file), run_dir, echo=lambda text: None, progress=False)


@pytest.fixture(scope="module")
def pair(folder, tiny):
    """The run of two processes, and what they printed."""
    output = finish(launch(tiny, folder / "pair", 2))
    return folder / "pair", output


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def files(run_dir) -> list[str]:
    """Of a run, without the checkpoints' own and with the time taken out of names."""
    names = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()]
    kept = [name for name in names if not name.startswith(("checkpoints", "logs"))]
    return sorted("events" if "tensorboard" in name else name for name in kept)


@pytest.mark.ledger("D10")
def test_two_processes_equal_one(pair, alone):
    assert_same_curve(pair[0], alone, 6)


def test_only_process_0_speaks_and_writes(pair, alone):
    run_dir, output = pair
    assert files(run_dir) == files(alone)
    assert "[0] step      6" in output and "[0]   devices" in output
    assert "[1]" not in output
    assert "processes" in output and "4 x cpu" in output
    # Each process wrote its own shards.
    for number in (0, 1):
        assert list((run_dir / "checkpoints" / "6" / "params").glob(f"ocdbt.process_{number}"))


def test_an_unreachable_coordinator(tiny, folder):
    address = f"127.0.0.1:{free_port()}"
    words = ("--coordinator", address, "--num-processes", "2", "--process-id", "1")
    run_dir = folder / "never"
    process = start("train", tiny, "--run-dir", run_dir, *words, "--join-timeout", "1")
    output = finish(process, status=2)
    assert f"could not reach the coordinator at {address} within 1 s" in output
    assert "start process 0 there" in output and "Traceback" not in output
    assert not run_dir.exists()


@pytest.mark.slow
def test_a_job_whose_others_do_not_come(tiny, folder):
    """Process 0 waits for the second in vain; then the port that it needs is another's."""
    words = ("train", tiny, "--run-dir", folder / "never", "--join-timeout", "2")
    with socket.socket() as listener:
        listener.bind(("", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        flags = ("--coordinator", address, "--num-processes", "2", "--process-id", "0")
        listener.listen()
        taken = finish(start(*words, *flags), status=2)
    assert f"process 0 cannot listen at {address}" in taken and "choose another port" in taken
    alone = finish(start(*words, *flags), status=2)
    assert f"not all 2 processes came to the coordinator at {address} within 2 s" in alone
    assert "@ 0x" not in alone and "Traceback" not in alone + taken
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--coordinator", "a:1"), "--num-processes, --process-id is missing"),
        (("--coordinator", "a", "--num-processes", "2", "--process-id", "0"), "takes HOST:PORT"),
        (("--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"), "counts from 0"),
        (("--num-processes", "two"), "--num-processes takes a number, not 'two'"),
    ],
)
def test_flags_that_cannot_be(tiny, folder, words, message, capsys):
    assert main(["train", str(tiny), "--run-dir", str(folder / "never"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never").exists()


# --- more processes, losses and refusals -----------------------------------------------------


@pytest.mark.slow
def test_four_processes_equal_one(folder, tiny, alone):
    finish(launch(tiny, folder / "four", 4))
    assert_same_curve(folder / "four", alone, 6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=1,tensor=4", "data=1,sequence=4", "data=2,sequence=2"])
def test_a_mesh_whose_rows_lie_on_several_devices(folder, tiny, mesh):
    """On all four of two processes, or with halves of its places on the two of one."""
    file = tiny.with_name("divided.py")
    file.write_text(tiny.read_text().replace("vocab_size=29", "vocab_size=32"))
    quietly(file, folder / f"whole {mesh}")
    finish(launch(file, folder / mesh, 2, "--mesh", mesh))
    assert_same_curve(folder / mesh, folder / f"whole {mesh}", 6)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_processes_resumes_exactly(folder, tiny, alone, first, second):
    """Stopped by a signal to one process alone, after any step."""
    run_dir = folder / f"resumed-{first}-{second}"
    slow = {"TINY_SLEEP": "0.3"}
    file = slowed(tiny)
    process = launch(file, run_dir, first, **slow)
    started = read_until(process, r"\[0\] step +2 ")
    os.kill(pids(started)[first - 1], signal.SIGTERM)
    output = finish(process, status=130)
    assert "SIGTERM at step" in output
    done = list(curve(run_dir))
    assert 2 <= len(done) < 6
    finish(launch(file, run_dir, second))
    assert_same_curve(run_dir, alone, 6)


def slowed(tiny):
    """The same experiment, whose batches take as long as the environment says."""
    file = tiny.with_name("slowed.py")
    file.write_text(
        tiny.read_text()
        + "\n\nimport os, time\nfrom lm.train.run import Run\n\ntake = Run.take_step\n\n\n"
        "def take_step(self, batch):\n"
        "    time.sleep(float(os.environ.get('TINY_SLEEP', 0)))\n"
        "    return take(self, batch)\n\n\n"
        "Run.take_step = take_step\n"
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_ends_the_job(folder, tiny, victim):
    run_dir = folder / f"killed-{victim}"
    process = launch(tiny, run_dir, 2, *LONG)
    started = read_until(process, r"\[0\] step +20 ")
    began = time.monotonic()
    os.kill(pids(started)[victim], signal.SIGKILL)
    output = finish(process, status=1, seconds=60)
    assert time.monotonic() - began < 60
    last = output.splitlines()[-1]
    assert last.startswith(f"lm launch: process {victim} was killed by SIGKILL at step ")
    assert last.endswith(f"all output is in {run_dir / 'logs'}")
    assert "Traceback" not in output and "@ 0x" not in output
    for pid in pids(started).values():
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_stopped_process_is_reported_as_hung(folder, tiny):
    run_dir = folder / "stopped"
    process = launch(tiny, run_dir, 2, *LONG, options=("--hang-seconds", "15"))
    started = read_until(process, r"\[0\] step +20 ")
    os.kill(pids(started)[1], signal.SIGSTOP)
    output = finish(process, status=1, seconds=60)
    assert "lm launch: process 1 hangs: it gave no sign of life" in output.splitlines()[-1]
    assert not any(alive(pid) for pid in pids(started).values())


@pytest.mark.slow
def test_a_lost_process_is_started_again(folder, tiny, alone):
    run_dir = folder / "again"
    process = launch(slowed(tiny), run_dir, 2, options=("--restarts", "1"), TINY_SLEEP="0.3")
    started = read_until(process, r"\[0\] step +3 ")
    os.kill(pids(started)[1], signal.SIGKILL)
    output = finish(process)
    assert "process 1 was killed by SIGKILL" in output
    assert "starting all processes again (1 of 1)" in output
    assert_same_curve(run_dir, alone, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (("--train.seed", "1"), "the hash of the config is not the same everywhere"),
        (
            ("--num-processes", "3"),
            "the number of processes is not the same everywhere: 2 on",
        ),
    ],
)
def test_unequal_commands_are_refused_on_both(folder, tiny, changes, message):
    outputs = two_by_hand(folder, tiny, changes)
    for output in outputs:
        assert message in output and "Traceback" not in output, output
    assert not (folder / "unequal").exists()


def two_by_hand(folder, tiny, changes=(), tree=ROOT) -> list[str]:
    """Starts two processes by flags; the second with changes, or from another tree."""
    address = f"127.0.0.1:{free_port()}"
    flags = {"--coordinator": address, "--num-processes": "2", "--run-dir": folder / "unequal"}
    processes = []
    for number in (0, 1):
        own = flags | {"--process-id": str(number)}
        if number == 1:
            own |= dict([changes]) if changes else {}
        words = [word for pair in own.items() for word in pair]
        processes.append(start("train", tiny, *words, tree=tree if number else ROOT))
    return [finish(process, status=2, seconds=120) for process in processes]


@pytest.mark.slow
def test_unequal_code_is_refused(folder, tiny):
    tree = folder / "tree"
    shutil.copytree(ROOT / "lm", tree / "lm", ignore=shutil.ignore_patterns("__pycache__"))
    file = tree / "lm" / "ops" / "softcap.py"
    file.write_text(file.read_text() + "\n# Changed on one host.\n")
    for output in two_by_hand(folder, tiny, tree=tree):
        assert "Traceback" not in output, output
        assert re.search("the hash of the (commit|source) is not the same everywhere", output)
    assert not (folder / "unequal").exists()
