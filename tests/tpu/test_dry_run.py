"""The exact commands of a dry run, kept in golden files; LM_UPDATE_GOLDEN=1 writes them anew."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tpu.cli import main

GOLDEN = Path(__file__).parent / "golden"
ROOT = GOLDEN.parents[2]
PLACE = ("--project=p", "--zone=us-west4-a", "--dry-run")
TRAIN = ("lm", "train", "experiments/headlines.py", "--mesh", "fsdp=4,tensor=4")
KEPT = (*TRAIN, "--checkpoint-dir", "gs://bucket/it's mine")
LINES = {
    "create": ("create", "pod", "--type=v5litepod-16"),
    "create_spot_v4": ("create", "pod", "--type=v4-32", "--spot"),
    "create_v5p": ("create", "pod", "--type=v5p-8", "--gcloud-flag=--network=mine"),
    "create_v6e": ("create", "pod", "--type=v6e-8", "--runtime-version=other"),
    "setup": ("setup", "pod", "--type=v5litepod-16"),
    "run": ("run", "pod", "--type=v5litepod-16", "--env=A=b c", "--", *TRAIN),
    "status": ("status", "pod", "--type=v4-16"),
    "logs": ("logs", "pod", "--type=v4-16"),
    "logs_of_one": ("logs", "pod", "--type=v4-16", "--worker=1", "--no-follow"),
    "stop": ("stop", "pod", "--type=v4-16"),
    "delete": ("delete", "pod"),
    "watch": ("watch", "pod", "--type=v4-16", "--spot", "--delete", "--", *KEPT),
}


def printed(name: str, capsys, tmp_path) -> str:
    """Returns what a dry run prints, without what differs from one time or place to another."""
    words = list(LINES[name])
    cut = words.index("--") if "--" in words else len(words)
    assert main([*words[:cut], *PLACE, *words[cut:]]) == 0
    text = capsys.readouterr().out.replace(str(tmp_path), "/tmp")
    return re.sub(r"--id=\d{8}-\d{6}-[0-9a-f]{4}", "--id=RUN", text)


@pytest.mark.ledger("D10")
@pytest.mark.parametrize("name", LINES)
def test_golden(name, cloud, capsys, tmp_path):
    text = printed(name, capsys, tmp_path)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("LM_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert not cloud.calls()  # Nothing was run.


@pytest.mark.ledger("D10")
def test_what_is_printed_is_a_shell_script(tmp_path):
    """All golden files, and any script there may be, as bash and shellcheck read them."""
    scripts = [*GOLDEN.glob("*.txt"), *(ROOT / "tpu").rglob("*.sh")]
    assert len(scripts) >= len(LINES)
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", *scripts], check=True)


def test_needs_no_gcloud(cloud, capsys, monkeypatch, tmp_path):
    (cloud.bin / "gcloud").unlink()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["create", "pod", "--type=v4-16", *PLACE]) == 0


def test_the_real_calls_are_these(cloud, capsys, tmp_path):
    """What a flow of commands calls is what their dry runs print, once for every look."""
    lines = [
        ["setup", "pod", "--type=v4-16"],
        ["run", "pod", "--type=v4-16", "--", "sh", "-c", 'echo "$FAKE_WORKER"; exit 0'],
        ["stop", "pod", "--type=v4-16"],
        ["delete", "pod"],
    ]
    assert main(["create", "pod", "--type=v4-16"]) == 0
    for words in lines:
        capsys.readouterr()
        before = len(cloud.calls())
        assert main(words) == 0
        real = [call for call in cloud.calls()[before:] if "config" not in call]
        cut = words.index("--") if "--" in words else len(words)
        assert main([*words[:cut], *PLACE, *words[cut:]]) == 0
        text = capsys.readouterr().out
        dry = [shlex.split(line) for line in text.splitlines() if line.startswith("gcloud ")]
        assert dry
        unnamed = [
            sorted(re.sub(r"--id=[-0-9a-f]+", "--id=RUN", shlex.join(call)) for call in calls)
            for calls in (real, dry)
        ]
        assert unnamed[0] == unnamed[1]


def test_the_commands_of_the_readme(cloud, capsys):
    text = (ROOT / "tpu/README.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    commands = [words[3:] for words in lines if words[:3] == ["python", "-m", "tpu"]]
    assert {words[0] for words in commands} >= {"create", "setup", "run", "watch", "delete"}
    for words in commands:
        cut = words.index("--") if "--" in words else len(words)
        kind = [] if "--type" in words else ["--type=v5litepod-16"]
        assert main([*words[:cut], *kind, *PLACE, *words[cut:]]) == 0, words
    assert not cloud.calls()
