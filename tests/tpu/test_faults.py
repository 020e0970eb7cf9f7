"""Bad input and failures of gcloud: what is tried again, how often, and what is said."""

import queue
import time

import pytest

from tests.tpu.test_flow import ready
from tpu import follow, slice
from tpu import gcloud as calls
from tpu import worker as agent
from tpu.cli import main

CREATE = ["create", "pod", "--type=v4-16"]
COUNT = ["bash", "-c", "for i in $(seq 1 200); do echo line $i; done"]


def said(capsys, words, status=2) -> str:
    assert main(words) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


@pytest.mark.parametrize(
    "words, message",
    [
        (["create", "pod", "--type=v5e-16"], "did you mean v5litepod-16"),
        (["create", "pod"], "--type is missing: pass one such as --type v5litepod-16"),
        (["create", "My_Pod", "--type=v4-16"], "'My_Pod' is no name of a TPU"),
        (["run", "pod"], "nothing to run: put it last, after --"),
        (["run", "pod", "--env=A", "--", "true"], "--env takes NAME=VALUE, not 'A'"),
        (["run", "pod", "--", "true"], "there is no TPU 'pod' in p, us-west4-a"),
        (["setup", "pod"], "python -m tpu create pod --type ... makes it"),
        (["logs", "pod"], "queued-resources list --zone=us-west4-a lists what there is"),
        (["stop", "pod"], "there is no TPU 'pod'"),
        (["delete", "pod"], "there is no TPU 'pod'"),
        (["status", "pod"], "there is no TPU 'pod'"),
        (["status", "pod", "--dry-run"], "a dry run asks nobody how many workers there are"),
        (
            ["watch", "pod", "--type=v4-16", "--", "lm", "train", "x"],
            "give lm train --checkpoint-dir gs://BUCKET/RUN",
        ),
        (
            ["watch", "pod", "--type=v4-16", "--", "lm", "train", "x", "--checkpoint-dir", "runs"],
            "what lies on the machines is lost",
        ),
    ],
)
def test_bad_input(cloud, capsys, words, message):
    assert message in said(capsys, words)


def test_gcloud_is_missing(cloud, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "gcloud is not on PATH: install the Google Cloud CLI" in said(capsys, ["status", "pod"])


@pytest.mark.parametrize("section, name", [("compute", "zone"), ("core", "project")])
def test_no_zone_or_project(cloud, capsys, monkeypatch, section, name):
    cloud.change(config={})
    monkeypatch.delenv("CLOUDSDK_COMPUTE_ZONE")
    monkeypatch.delenv("CLOUDSDK_CORE_PROJECT")
    other = {"zone": "--project=p", "project": "--zone=z"}[name]
    message = said(capsys, ["status", "pod", other])
    assert f"no {name}: pass --{name} such as" in message
    assert f"gcloud config set {section}/{name}" in message
    # gcloud's configuration says it, and so do the variables that gcloud reads.
    cloud.change(config={f"{section}/{name}": "x"})
    assert "there is no TPU 'pod'" in said(capsys, ["status", "pod", other])
    cloud.change(config={})
    monkeypatch.setenv(f"CLOUDSDK_{section}_{name}".upper(), "x")
    assert "there is no TPU 'pod'" in said(capsys, ["status", "pod", other])


@pytest.mark.parametrize(
    "how, message",
    [
        ("login", "run gcloud auth login"),
        ("disabled", "gcloud services enable tpu.googleapis.com --project=p"),
        ("quota", "Quota limit 'TPUV5sLitepodPerProject' has been exceeded. Limit: 16"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(cloud, capsys, how, message):
    cloud.fail("create", how=how, times=99)
    assert message in said(capsys, CREATE)
    assert len(cloud.calls("create")) == 1


def test_what_passes_is_tried_again(cloud, capsys):
    cloud.fail("describe", how="unavailable", times=4)
    out = said(capsys, CREATE, 0)
    assert "UNAVAILABLE: The service is currently unavailable.; attempt 2 of 5" in out


def test_attempts_have_a_limit(cloud, capsys):
    cloud.fail("create", how="unavailable", times=99)
    message = said(capsys, CREATE)
    assert "create pod failed 5 times; last: ERROR" in message
    assert len(cloud.calls("create")) == 5


def test_a_request_that_was_heard_is_not_an_error(cloud, capsys):
    """The first call makes the request and its answer is lost; the second finds it there."""
    cloud.fail("create", how="unavailable, heard")
    out = said(capsys, CREATE, 0)
    assert "it costs until" in out and "was asked for before" not in out
    assert len(cloud.calls("queued-resources", "create")) == 2


def test_create_comes_back_to_a_request(cloud, capsys):
    assert main([*CREATE, "--no-wait"]) == 0
    assert "pod was asked for before" in said(capsys, CREATE, 0)
    message = said(capsys, ["create", "pod", "--type=v5litepod-8"])
    assert "pod is a v4-16, not the v5litepod-8 of --type" in message


def test_a_call_that_hangs_is_ended(cloud, capsys, monkeypatch):
    ready(cloud, capsys)
    monkeypatch.setattr(
        slice.Slice,
        "agent",
        lambda self, worker, *words, timeout=0: self.gcloud.run(
            self.agent_line(worker, *words), 0.5
        ),
    )
    cloud.fail("ssh", "--worker=1", "state", how="hang")
    start = time.monotonic()
    out = said(capsys, ["status", "pod"], 0)
    assert time.monotonic() - start < 5
    assert "ssh, worker 1: ERROR: no answer within 0.5 s; attempt 2 of 5" in out
    assert "[1] none" in out


def test_a_worker_that_cannot_be_reached_is_named(cloud, capsys):
    ready(cloud, capsys)
    cloud.fail("ssh", "--worker=1", how="unreachable", times=99)
    assert "worker 1 of pod: ssh, worker 1 failed 5 times" in said(capsys, ["status", "pod"])


def test_a_start_whose_answer_is_lost_is_one_run(cloud, capsys):
    ready(cloud, capsys)
    cloud.fail("ssh", "start", "--worker=0", how="cut after 1")
    assert main(["run", "pod", "--", "sh", "-c", "echo once >> ../count"]) == 0
    assert len(cloud.calls("ssh", " start ", "--worker=0")) == 2
    assert (cloud.worker("pod", 0) / "lm/count").read_text() == "once\n"


def test_logs_survive_lost_connections(cloud, capsys):
    """No line is lost and none comes twice, wherever the connection breaks."""
    ready(cloud, capsys)
    for lines in (1, 37, 60, 2):
        cloud.fail("follow", "--worker=0", how=f"cut after {lines}")
    assert main(["run", "pod", "--", *COUNT]) == 0
    out = capsys.readouterr().out.splitlines()
    for worker in range(2):
        mine = [line for line in out if line.startswith(f"[{worker}] ")]
        assert mine == [f"[{worker}] line {i}" for i in range(1, 201)]
    assert len(cloud.calls("lm-worker.py follow", "--worker=0")) == 5


def test_a_silent_connection_is_made_anew(cloud, capsys, monkeypatch):
    monkeypatch.setattr(follow, "SILENCE_SECONDS", 3.0)
    ready(cloud, capsys)
    cloud.fail("follow", "--worker=1", how="hang")
    assert main(["run", "pod", "--", *COUNT]) == 0
    assert capsys.readouterr().out.count("[1] line") == 200
    assert len(cloud.calls("lm-worker.py follow", "--worker=1")) >= 2


def test_following_gives_up(cloud, capsys):
    ready(cloud, capsys)
    cloud.fail("follow", "--worker=1", how="unreachable", times=99)
    message = said(capsys, ["run", "pod", "--", "sleep", "30"])
    assert "worker 1: ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited" in message
    assert len(cloud.calls("lm-worker.py follow", "--worker=1")) == calls.ATTEMPTS


def test_a_slice_that_was_taken_away(cloud, capsys):
    ready(cloud, capsys)
    cloud.preempt("pod")
    message = said(capsys, ["run", "pod", "--", "true"])
    assert "pod cannot be used any more (SUSPENDING): python -m tpu delete pod" in message


def test_a_process_that_holds_the_tpu_is_named(tmp_path, monkeypatch):
    """A file stands for the device; the lock file stays while somebody has it open."""
    device = tmp_path / "accel0"
    (tmp_path / "libtpu_lockfile").touch()
    monkeypatch.setattr(agent, "DEVICES", (str(tmp_path / "accel"),))
    monkeypatch.setattr(agent, "TEMP", tmp_path)
    with device.open("w"), pytest.raises(SystemExit) as refused:
        agent.clear_lockfiles()
    assert refused.value.code == agent.REFUSED
    assert (tmp_path / "libtpu_lockfile").exists()
    agent.clear_lockfiles()
    assert not (tmp_path / "libtpu_lockfile").exists()


def test_drain_prints_all_that_has_come():
    lines = queue.Queue()
    for i in range(500):
        lines.put((i % 2, f"line {i}"))
    out = []
    follow.drain(lines, out.append)
    assert out == [f"[{i % 2}] line {i}" for i in range(500)]
