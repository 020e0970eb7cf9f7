"""The whole flow against the fake gcloud: create, setup, run, status, logs, stop, delete."""

import ast
import json
import signal
import subprocess
import sys

import pytest

from tests.tpu.cloud import ROOT, wait_for
from tpu import follow
from tpu.cli import main

SAYS = 'echo "$FAKE_WORKER on $JAX_PLATFORMS of $LM_COMMIT"; echo done'


def ready(cloud, capsys, kind="v4-16"):
    """Has a slice with everything set up, as create and setup leave it."""
    if not cloud.take_copy(kind):
        assert main(["create", "pod", f"--type={kind}"]) == 0
        assert main(["setup", "pod"]) == 0
        cloud.keep_copy(kind)
    capsys.readouterr()


def test_create_waits_in_the_queue(cloud, capsys):
    assert main(["create", "pod", "--type=v5litepod-16", "--spot"]) == 0
    out = capsys.readouterr().out
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert [line for line in out.splitlines() if line.startswith("pod: ")] == [
        f"pod: {state}" for state in states
    ]
    assert "it costs until python -m tpu delete pod" in out
    assert len(cloud.calls("create", "--spot", "--runtime-version=v2-alpha-tpuv5-lite")) == 1


def test_setup_puts_the_tree_and_the_lock_on_every_worker(cloud, capsys):
    ready(cloud, capsys)
    for worker in range(2):
        home = cloud.worker("pod", worker)
        assert (home / "lm/tree/hello.txt").read_text() == "hello\n"
        calls = (home / "uv-calls").read_text().splitlines()
        assert [call.split()[0] for call in calls] == ["venv", "pip", "pip"]
        assert "sync --require-hashes" in calls[1]
        assert calls[1].endswith("lm/tree/tpu/requirements.lock")
    # The same lock is not installed again, and what a run wrote stays.
    (cloud.worker("pod", 0) / "lm/tree/runs/kept").write_text("kept")
    assert main(["setup", "pod"]) == 0
    calls = (cloud.worker("pod", 0) / "uv-calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls[3:]] == [["pip", "install"]]
    assert (cloud.worker("pod", 0) / "lm/tree/runs/kept").read_text() == "kept"


def test_run_prints_each_line_with_its_worker(cloud, capsys):
    ready(cloud, capsys, "v5litepod-16")
    assert main(["run", "pod", "--env=MORE=1 2", "--", "sh", "-c", SAYS + '; echo "$MORE"']) == 0
    out = capsys.readouterr().out
    commit = json.loads((cloud.worker("pod", 0) / "lm/tree.json").read_text())["commit"]
    assert len(commit) == 40
    for worker in range(4):
        mine = [line[4:] for line in out.splitlines() if line.startswith(f"[{worker}] ")]
        assert mine == [f"{worker} on tpu of {commit}", "done", "1 2"]
    assert "the run is complete; the machines cost until python -m tpu delete pod" in out


def test_status_logs_stop_delete(cloud, capsys):
    ready(cloud, capsys)
    command = 'i=0; while true; do i=$((i+1)); echo "line $i"; sleep 0.05; done'
    assert main(["run", "pod", "--detach", "--", "bash", "-c", command]) == 0
    assert main(["status", "pod"]) == 0
    out = capsys.readouterr().out
    assert "pod: v4-16, 2 workers, READY, in us-west4-a" in out
    assert "[0] running: bash -c" in out and "[1] running: bash -c" in out
    log = cloud.worker("pod", 1) / "lm/log"
    wait_for(lambda: len(log.read_text().splitlines()) > 5)
    assert main(["logs", "pod", "--no-follow", "--worker=1", "--lines=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    numbers = [int(line.rpartition(" ")[2]) for line in out[:-1]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] > 1
    assert out[-1] == "worker 1 goes on"
    # Neither setup nor a second run disturbs it.
    assert main(["setup", "pod"]) == 2
    assert "worker 0, 1 of pod: a run is going on here" in capsys.readouterr().err
    assert main(["run", "pod", "--", "true"]) == 2
    assert "a run is going on here" in capsys.readouterr().err
    assert main(["stop", "pod"]) == 0
    assert "[1] stopped with status 143" in capsys.readouterr().out
    assert main(["logs", "pod"]) == 0
    assert "worker 0 was stopped by hand" in capsys.readouterr().out
    assert main(["stop", "pod"]) == 0
    assert "[0] nothing runs" in capsys.readouterr().out
    assert main(["delete", "pod"]) == 0
    assert "costs no more" in capsys.readouterr().out
    assert main(["status", "pod"]) == 2
    assert "there is no TPU 'pod' in p, us-west4-a" in capsys.readouterr().err


def test_stop_kills_what_does_not_end(cloud, capsys):
    ready(cloud, capsys)
    command = "trap 'echo asked' TERM; echo begun; while true; do sleep 0.05; done"
    assert main(["run", "pod", "--detach", "--", "bash", "-c", command]) == 0
    for worker in range(2):
        log = cloud.worker("pod", worker) / "lm/log"
        wait_for(lambda log=log: "begun" in log.read_text())
    assert main(["stop", "pod", "--grace=0.5"]) == 0
    out = capsys.readouterr().out
    assert "[0] killed, since it had not ended after 0.5 s\nstopped with status 137" in out
    assert "asked" in (cloud.worker("pod", 0) / "lm/log").read_text()


def test_one_lost_worker_ends_the_job(cloud, capsys, monkeypatch):
    monkeypatch.setattr(follow, "LAG_SECONDS", 0.2)
    ready(cloud, capsys)
    command = '[ "$FAKE_WORKER" = 1 ] && kill -9 $$; sleep 60'
    assert main(["run", "pod", "--", "bash", "-c", command]) == 1
    out = capsys.readouterr().out
    assert "worker 1 of pod was killed (status 137: out of memory, or by hand)" in out
    assert "stopping the workers that are left" in out
    assert "worker 0 of pod was stopped with the others" in out
    assert "the run failed" in out


def test_a_command_that_is_not_there(cloud, capsys):
    ready(cloud, capsys)
    assert main(["run", "pod", "--", "no-such-command"]) == 1
    assert "[0] lm-tpu: no-such-command cannot be run" in capsys.readouterr().out


def test_run_refuses_another_tree_than_lies_there(cloud, capsys, tmp_path):
    assert main(["create", "pod", "--type=v4-16"]) == 0
    assert main(["run", "pod", "--", "true"]) == 2
    err = capsys.readouterr().err
    assert "worker 0, 1 of pod: nothing is set up: python -m tpu setup pod" in err
    assert main(["setup", "pod"]) == 0
    (tmp_path / "checkout/hello.txt").write_text("changed\n")
    assert main(["run", "pod", "--", "true"]) == 2
    assert "run 'setup' again" in capsys.readouterr().err


def test_a_lock_that_cannot_be_installed_says_what_uv_said(cloud, capsys, tmp_path):
    (tmp_path / "checkout/tpu/requirements.lock").write_text("broken\n")
    assert main(["create", "pod", "--type=v4-16"]) == 0
    assert main(["setup", "pod"]) == 2
    assert "there is no package called broken" in capsys.readouterr().err
    assert main(["run", "pod", "--", "true"]) == 2
    assert "nothing is set up here" in capsys.readouterr().err


def test_stale_lockfiles_are_removed(cloud, capsys):
    ready(cloud, capsys)
    for name in ("libtpu_lockfile", "libtpu_lockfile.1"):
        (cloud.worker("pod", 1) / "tmp" / name).touch()
    (cloud.worker("pod", 1) / "tmp/other").touch()
    assert main(["run", "pod", "--", "sh", "-c", "ls $LM_TPU_TMP"]) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1]")]
    assert out == ["[1] other"]


@pytest.mark.parametrize("verb", ["run", pytest.param("watch", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_the_run(cloud, capsys, verb):
    ready(cloud, capsys)
    options = ["--type=v4-16"] if verb == "watch" else []
    command = ["bash", "-c", "for i in 1 2 3; do echo $i; sleep 0.7; done; touch ended"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tpu", verb, "pod", *options, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1] 1"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the run go" in err or "the slice and the run go on" in err
    assert "python -m tpu logs pod" in err or "the same command watches again" in err
    for worker in range(2):
        wait_for((cloud.worker("pod", worker) / "lm/tree/ended").exists)
    assert main(["logs", "pod", "--lines=9"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("[0]")] == [
        f"[0] {i}" for i in (1, 2, 3)
    ]


def test_the_worker_is_of_an_old_python():
    source = (ROOT / "tpu/worker.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source


def test_imports_only_the_standard_library():
    """As on a laptop that has no jax, and on a machine that has nothing."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tpu.cli, tpu.worker; "
        "extra = {m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names; "
        "print(sorted(m for m in extra if not m.startswith('_')))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "['tpu']", done.stdout + done.stderr
