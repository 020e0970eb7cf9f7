"""`watch`: a run that goes on through preemptions, and gives up where going on is no use."""

import threading

import pytest

from tests.tpu.cloud import wait_for
from tests.tpu.test_flow import ready
from tpu import follow
from tpu.cli import main

WATCH = ["watch", "pod", "--type=v4-16", "--spot", "--poll=0.1"]


def resuming(tmp_path, seconds: float) -> list[str]:
    """A run that keeps its step outside of the machines, and ends at step 20."""
    step = f"{tmp_path}/step-$FAKE_WORKER"
    return [
        "bash",
        "-c",
        f"i=$(cat {step} 2>&- || echo 0); echo $i >> {tmp_path}/began-$FAKE_WORKER; "
        f"while [ $i -lt 20 ]; do i=$((i+1)); echo step $i; echo $i > {step}; sleep {seconds}; "
        "done; echo complete",
    ]


@pytest.fixture(autouse=True)
def no_lag(monkeypatch):
    monkeypatch.setattr(follow, "LAG_SECONDS", 0.2)


def at_step(tmp_path, step: int) -> bool:
    path = tmp_path / "step-1"
    return path.exists() and int(path.read_text() or 0) >= step


def test_creates_sets_up_and_runs(cloud, capsys, tmp_path):
    assert main([*WATCH, "--delete", "--", *resuming(tmp_path, 0)]) == 0
    out = capsys.readouterr().out
    assert "pod: WAITING_FOR_RESOURCES" in out and "pod: PROVISIONING" in out
    assert out.count("[0] step") == out.count("[1] step") == 20
    assert "the run is complete, and the slice is deleted" in out
    assert len(cloud.calls("queued-resources", "create")) == 1
    assert len(cloud.calls("queued-resources", "delete")) == 1


@pytest.mark.parametrize("node_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recreates_and_resumes(cloud, capsys, tmp_path, node_only):
    def preempt():
        wait_for(lambda: at_step(tmp_path, 5))
        cloud.preempt("pod", node_only)
        wait_for(lambda: len(cloud.calls("queued-resources", "create")) == 2)
        wait_for(lambda: at_step(tmp_path, 10))
        cloud.preempt("pod", node_only)

    thread = threading.Thread(target=preempt)
    thread.start()
    assert main([*WATCH, "--", *resuming(tmp_path, 0.1)]) == 0
    thread.join()
    out = capsys.readouterr().out
    began = [int(line) for line in (tmp_path / "began-1").read_text().splitlines()]
    assert len(began) == 3 and began[0] == 0 and 5 <= began[1] < began[2] < 20
    assert "deleting it, to ask for another" in out
    assert out.count("[1] complete") == 1
    assert len(cloud.calls("queued-resources", "create")) == 3
    assert len(cloud.calls("queued-resources", "delete", "--force")) == 2
    assert "the run is complete; the machines cost" in out


@pytest.mark.slow
def test_preempted_during_setup(cloud, capsys, tmp_path):
    def preempt():
        wait_for(lambda: cloud.calls("scp"))
        cloud.preempt("pod")

    thread = threading.Thread(target=preempt)
    thread.start()
    assert main([*WATCH, "--", *resuming(tmp_path, 0)]) == 0
    thread.join()
    assert len(cloud.calls("queued-resources", "create")) == 2
    assert capsys.readouterr().out.count("[0] complete") == 1


@pytest.mark.slow
def test_requests_that_fail_have_a_limit(cloud, capsys):
    cloud.change(grants=0)
    assert main([*WATCH, "--", "true"]) == 2
    captured = capsys.readouterr()
    message = "5 requests for pod failed, the last with FAILED: no more capacity in the zone"
    assert message in captured.err
    assert len(cloud.calls("queued-resources", "create")) == 5


@pytest.mark.slow
def test_failures_on_good_machines_have_a_limit(cloud, capsys):
    command = ["bash", "-c", '[ "$FAKE_WORKER" = 1 ] && exit 7; sleep 60']
    assert main([*WATCH, "--restarts=2", "--", *command]) == 2
    captured = capsys.readouterr()
    assert "worker 1 ended with status 7: restart 2 of 2" in captured.out
    assert "worker 1 of pod ended with status 7, after 2 restarts" in captured.err
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 3
    assert len(cloud.calls("queued-resources", "create")) == 1


@pytest.mark.slow
def test_a_crash_is_resumed_on_the_same_machines(cloud, capsys, tmp_path):
    crash = f"[ $FAKE_WORKER = 0 ] && [ ! -e {tmp_path}/crashed ] && touch {tmp_path}/crashed && "
    command = resuming(tmp_path, 0.02)
    command[2] = f"{crash} kill -9 $$; {command[2]}"
    assert main([*WATCH, "--", *command]) == 0
    out = capsys.readouterr().out
    assert "worker 0 of pod was killed" in out and "restart 1 of 3" in out
    assert len(cloud.calls("queued-resources", "create")) == len(cloud.calls("scp", "--worker=0"))


def test_bad_input_is_not_tried_again(cloud, capsys):
    assert main([*WATCH, "--", "bash", "-c", "exit 2"]) == 2
    assert "refused the command (status 2), and would again" in capsys.readouterr().err
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 1


@pytest.mark.slow
def test_stopped_by_hand_stays_stopped(cloud, capsys, tmp_path):
    def stop():
        wait_for(lambda: at_step(tmp_path, 3))
        assert main(["stop", "pod"]) == 0

    thread = threading.Thread(target=stop)
    thread.start()
    assert main([*WATCH, "--", *resuming(tmp_path, 0.3)]) == 2
    thread.join()
    assert "was stopped by python -m tpu stop" in capsys.readouterr().err
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 1
    # Until somebody watches it again.
    assert main([*WATCH, "--", *resuming(tmp_path, 0)]) == 0
    assert capsys.readouterr().out.count("[1] complete") == 1


@pytest.mark.slow
def test_an_outage_here_is_waited_out(cloud, capsys, tmp_path):
    cloud.fail("queued-resources describe", how="unavailable", times=13)
    assert main([*WATCH, "--", *resuming(tmp_path, 0)]) == 0
    assert "describe pod failed 5 times" in capsys.readouterr().out


def test_another_type_is_refused(cloud, capsys):
    ready(cloud, capsys, "v5litepod-8")
    assert main([*WATCH, "--", "true"]) == 2
    assert "pod is a v5litepod-8, not the v4-16 of --type" in capsys.readouterr().err


@pytest.mark.slow
def test_watch_comes_back_to_a_run(cloud, capsys, tmp_path):
    command = resuming(tmp_path, 0.1)
    assert main(["create", "pod", "--type=v4-16"]) == 0
    assert main(["setup", "pod"]) == 0
    assert main(["run", "pod", "--detach", "--", *command]) == 0
    assert main([*WATCH, "--", *command]) == 0
    out = capsys.readouterr().out
    assert "pod: the run goes on" in out and "[1] complete" in out
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 1
    # Complete, it is not run again; another command does not take a run's place.
    assert main([*WATCH, "--", *command]) == 0
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 1
    assert main(["run", "pod", "--detach", "--", "sleep", "30"]) == 0
    assert main([*WATCH, "--", *command]) == 2
    assert "another run goes on there: python -m tpu stop pod first" in capsys.readouterr().err
