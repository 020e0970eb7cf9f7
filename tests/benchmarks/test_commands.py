"""The commands as they are called."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.command import main
from benchmarks.decode import decode
from benchmarks.harness import ROOT
from benchmarks.inputs import TOKENS, requests
from benchmarks.serve import serve
from benchmarks.train import choice, train


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        (train, ["--peers", "hugging"], "there is no peer 'hugging' here"),
        (train, ["--peers", "hf+fast"], "hf has no way 'fast' to run"),
        (train, ["--python", "litgpt=/no/where"], "of litgpt is not there"),
        (decode, ["--new", "1"], "new is 2 or more"),
        (serve, ["--slots", "0"], "count, prompt and slots are 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(function, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # The tests' own stay.
    with pytest.raises(SystemExit) as stopped:
        main(function)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_peers_of_a_shape():
    assert choice("tiny") == ["torch", "torch+compile"]
    assert choice("gpt2") == ["hf", "hf+compile"]
    assert "litgpt+compile" in choice("llama-1.3b")


def test_requests_are_the_same_for_all(tmp_path):
    np.save(tmp_path / TOKENS, np.arange(8 * 4 * 33).reshape(8, 4, 33))
    asked = requests(tmp_path, 50, prompt=16, new=8)
    assert asked == requests(tmp_path, 50, prompt=16, new=8)
    assert {len(ids) for ids, _ in asked} <= set(range(2, 17)) and len(asked) == 50
    assert {new for _, new in asked} == set(range(2, 9))


SHORT = ["--prompt", "8", "--new", "8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "peers", "words"),
    [
        ("train", ["hf"], []),
        ("finetune", ["lm-full", "peft"], []),
        ("decode", ["hf", "lm+cache_dtype=float32"], SHORT),
        ("serve", ["lm+static", "hf", "hf+continuous"], ["--count", "5", "--slots", "2", *SHORT]),
        ("memory", ["hf"], []),
        ("compile", ["hf"], []),
        ("data", ["tokenize", "pack", "loader"], []),
    ],
)
def test_a_command_from_end_to_end(command, peers, words, tmp_path):
    """The loss of every peer is ours, and every token of greedy decoding."""
    pytest.importorskip("peft")
    # The tests' own eight devices would have to share a batch of two rows.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    call = [sys.executable, "-m", f"benchmarks.{command}", "--shape", "smoke", "--rounds", "1"]
    call += ["--seconds", "0.1", "--peers", *peers, "--out", str(tmp_path), *words]
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert result["absent"] == []
    assert {"lm", *peers} <= {name.removesuffix(", again") for name in result["contestants"]}
    text = next(tmp_path.glob("*.md")).read_text()
    assert "NOT THE SAME COMPUTATION" not in text
    if command == "serve":
        assert all(f"{peer}: 5 of 5 prompts got the tokens of ours" in text for peer in peers)
    if command == "decode":
        assert "64 of 64 tokens are those of ours" in text
