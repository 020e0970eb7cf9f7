"""`lm launch`: its options, and what it says of processes that end, hang or are slow."""

import signal
import sys
import time
from dataclasses import replace

import pytest

from lm.cli import main
from lm.commands.launch import device_variables, layout_of, split
from lm.commands.verdicts import End, Pace, hung, lost, slow_ranks
from lm.core import beat
from lm.core.beat import Mark, read_mark

GLOO = "jax.errors.JaxRuntimeError: FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed"
HEARTBEAT = (
    "F1122 04:10:16.1 12 client.h:80] Terminating process because the JAX distributed service "
    "detected fatal errors: heartbeat timeout of /job:jax_worker/replica:0/task:5"
)


@pytest.mark.parametrize(
    "ends, stale, rank, reason",
    [
        # The others may be seen to end before the one that was killed.
        ({0: End(1, GLOO, 1.0), 1: End(-9, "", 2.0)}, [], 1, "was killed by SIGKILL"),
        ({0: End(-6, HEARTBEAT, 1.0), 1: End(-11, "", 1.5)}, [], 1, "was killed by SIGSEGV"),
        ({0: End(1, GLOO, 1.0), 1: End(1, "KeyError: 1", 1.1)}, [], 1, "status 1 (KeyError: 1)"),
        ({0: End(1, GLOO, 1.0)}, [1], 1, "is stopped"),
        ({0: End(-6, HEARTBEAT, 1.0), 1: End(-6, HEARTBEAT, 1.0)}, [], 5, "lost on another host"),
        ({0: End(1, GLOO, 1.0), 1: End(1, GLOO, 1.1)}, [], 0, "ended with status 1"),
        ({0: End(130, "", 0.5), 1: End(2, "lm: no such file", 1.0)}, [], 1, "(no such file)"),
    ],
)
def test_which_process_was_lost(ends, stale, rank, reason):
    found, text = lost(ends, stale)
    assert found == rank and reason in text


def marks(*pairs: tuple[int, float]) -> dict[int, Mark]:
    """Marks of processes that run at time 1000: (places they came to, seconds they stand there)."""
    return {
        rank: Mark(count, count, "the step", 1000 - seconds, 0.0, 999.5)
        for rank, (count, seconds) in enumerate(pairs)
    }


def test_which_process_hangs():
    assert hung(marks((7, 5), (6, 90)), 1000, 10) == ""
    assert hung({0: None, 1: None}, 1000, 10) == ""
    text = hung(marks((7, 11), (6, 12), (7, 11)), 1000, 10)
    assert text.startswith("process 1 hangs: for 12 s it did not go on from the step 6")
    stopped = marks((7, 11), (7, 11))
    stopped[0] = replace(stopped[0], at=988.0)
    assert hung(stopped, 1000, 10).startswith("process 0 hangs: it gave no sign of life for 12 s")
    assert "none of this host is behind" in hung(marks((7, 11), (7, 11)), 1000, 10)
    # Before the first step one makes data, and the others wait.
    assert hung(marks((0, 500), (0, 500)), 1000, 10) == ""
    ended = {rank: replace(mark, place="the end") for rank, mark in marks((9, 99), (9, 99)).items()}
    assert hung(ended, 1000, 10) == ""


def test_which_process_is_slow():
    before = {rank: Mark(step=10, busy=1.0) for rank in range(3)}
    after = {0: Mark(step=20, busy=1.1), 1: Mark(step=20, busy=4.0), 2: Mark(step=19, busy=1.2)}
    (rank, (own, others, step)), *rest = slow_ranks(before, after, 5.0).items()
    assert rank == 1 and not rest
    assert (own, step) == (pytest.approx(0.3), pytest.approx(0.5))
    assert others == pytest.approx((0.01 + 0.2 / 9) / 2)
    # Three times the others' time, and next to nothing of a step.
    after[1] = Mark(step=20, busy=1.3)
    assert slow_ranks(before, after, 50.0) == {}
    assert slow_ranks(before, before, 5.0) == {}


def test_a_slow_process_is_told_once_after_two_stretches(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    pace, told = Pace(10.0), []
    for second in range(60):
        clock[0] = float(second)
        now = {0: Mark(step=second, busy=0.01 * second), 1: Mark(step=second, busy=0.8 * second)}
        told.append(pace.look(now))
    spoken = [(second, text) for second, text in enumerate(told) if text]
    assert [second for second, _ in spoken] == [30]
    assert spoken[0][1].startswith("process 1 is slow: it works 0.8 s by itself")


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(beat, "BEAT_SECONDS", 0.02)
    assert read_mark(tmp_path / "beat") is None
    writer = beat.Beat(tmp_path / "beat")
    first = read_mark(tmp_path / "beat")
    assert first is not None and (first.count, first.place) == (0, "starting")
    writer.resume("work", 3)
    time.sleep(0.05)
    writer.come_to("the step", 4)
    mark = read_mark(tmp_path / "beat")
    assert mark is not None and (mark.count, mark.step, mark.place) == (2, 4, "the step")
    assert 0.05 <= mark.busy < 1
    time.sleep(0.1)
    renewed = read_mark(tmp_path / "beat")
    assert renewed is not None and renewed.at > mark.at and renewed.busy == mark.busy


def run(*words: str, capfd) -> tuple[int, str, str]:
    status = main(["launch", *words])
    out, err = capfd.readouterr()
    return status, out, err


def test_output_has_the_number_in_front_and_traces_go_to_the_log(tmp_path, capfd):
    script = (
        "import os, sys; n = os.environ['LM_PROCESS_ID']; print('hello from', n)\n"
        "if n == '1':\n"
        "    print('F1122 04:10:16.123456 12 client.h:80] fatal', file=sys.stderr)\n"
        "    print('    @ 0x7f00  frame', file=sys.stderr, flush=True)\n"
        "    raise KeyError('gone')\n"
        "import time; time.sleep(60)\n"
    )
    logs = tmp_path / "logs"
    words = ("--num-processes", "2", "--log-dir", str(logs), "--", sys.executable, "-c", script)
    began = time.monotonic()
    status, out, err = run(*words, capfd=capfd)
    assert status == 1 and time.monotonic() - began < 20
    assert "[0] hello from 0\n" in out and "[1] hello from 1\n" in out
    last = err.splitlines()[-1]
    assert last.startswith("lm launch: process 1 ended with status 1 (KeyError: 'gone')")
    for trace in ("Traceback", "client.h", "0x7f00"):
        assert trace not in out + err
        assert trace in (logs / "process-1.log").read_text()


def test_ends_well_and_hands_devices_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_a=b")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ("--num-processes", "2", "--devices-per-process", "3", "--log-dir", str(tmp_path))
    show = "echo $XLA_FLAGS $LM_NUM_PROCESSES $LM_PROCESS_ID $LM_COORDINATOR"
    status, out, _ = run(*words, "--", "sh", "-c", show, capfd=capfd)
    assert status == 0
    zero, one = sorted(out.splitlines())
    expected = "--xla_a=b --xla_force_host_platform_device_count=3 2"
    assert zero.startswith(f"[0] {expected} 0 127.0.0.1:")
    assert one == zero.replace("[0]", "[1]").replace(f"{expected} 0", f"{expected} 1")


def test_each_process_has_gpus_of_its_own():
    base = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert device_variables(2, 1, base) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(ValueError, match="would need the GPUs 4 to 5, and there are 4"):
        device_variables(2, 2, base)


def test_several_hosts_count_on():
    own, command = split(
        ["--num-processes=4", "--num-hosts", "2", "--host", "1", "--coordinator", "a:1", "--", "x"]
    )
    layout = layout_of(own)
    assert list(layout.ranks) == [4, 5, 6, 7] and command == ["x"]
    found = layout.environment(5, "a:1", {})
    assert (found["LM_PROCESS_ID"], found["LM_NUM_PROCESSES"]) == ("5", "8")
    assert "LM_COORDINATOR" not in layout_of(split(["--", "x"])[0]).environment(0, "a:1", {})


@pytest.mark.parametrize(
    "words, message",
    [
        (["--processes", "2", "--", "x"], "no option '--processes'"),
        (["--num-processes", "--", "x"], "--num-processes needs a value"),
        (["--num-processes", "two", "--", "x"], "takes a number, not 'two'"),
        (["--num-processes", "0", "--", "x"], "are 1 or more"),
        (["--num-hosts", "2", "--", "x"], "several hosts need --coordinator"),
        (["--num-hosts", "2", "--host", "2", "--", "x"], "counts from 0 to 1 on 2 hosts, and is 2"),
        (["--", "no-such-command"], "there is no command 'no-such-command'"),
    ],
)
def test_options_that_cannot_be(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_signal_is_handed_on(tmp_path, capfd):
    script = (
        "import os, signal, sys, time\n"
        "def stop(*_): print('saved', flush=True); os._exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "time.sleep(1.0)\n"
        "if os.environ['LM_PROCESS_ID'] == '0': os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    words = ("--num-processes", "2", "--log-dir", str(tmp_path), "--", sys.executable, "-c", script)
    status, out, err = run(*words, capfd=capfd)
    assert "[0] saved" in out, err
    assert signal.getsignal(signal.SIGTERM) is before
    assert status == 130
