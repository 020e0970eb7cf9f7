"""Names on the command line, and the contestants that they are."""

import sys

import pytest

from benchmarks.peers import (
    FINETUNING,
    KEPT_HEAP,
    SERVING,
    TRAINING,
    contestants,
    parse_pythons,
)

COMMON = {"shape": "gpt2", "inputs": "there", "dtype": "bf16"}


def make(names, shape="gpt2", tmp="", known=TRAINING, pythons=None):
    return contestants(known, names, shape, COMMON, pythons or {}, tmp)


def test_ours_comes_first_and_ways_are_options(tmp_path):
    found, out = make(["hf+compile+pure", "lm+micro_batches=4"], tmp=tmp_path)
    assert [one.name for one in found] == ["lm", "hf+compile+pure", "lm+micro_batches=4"]
    assert out == []
    assert found[0].options == COMMON
    assert found[1].options == {**COMMON, "compile": True, "pure": True}
    assert found[2].options == {**COMMON, "micro_batches": 4}


def test_capitals_are_variables_of_ours(tmp_path):
    name = "lm+XLA_FLAGS=--xla_cpu_enable_fast_math=true"
    (plain, flagged), _ = make([name], tmp=tmp_path)
    assert flagged.options == plain.options == COMMON
    assert flagged.env["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"
    assert "XLA_FLAGS" not in plain.env


def test_torch_gets_the_heap_that_ours_has(tmp_path):
    found, _ = make(["hf", "hf+plainheap", "lm+plainheap"], tmp=tmp_path)
    env = {one.name: one.env for one in found}
    (_, serving), _ = make(["hf+continuous"], tmp=tmp_path, known=SERVING)
    assert KEPT_HEAP.items() <= env["hf"].items() & serving.env.items()
    assert not KEPT_HEAP.keys() & env["hf+plainheap"].keys()
    assert env["lm+plainheap"]["LM_KEEP_HEAP"] == "0"


def test_every_contestant_compiles_anew(tmp_path):
    found, _ = make(["hf"], tmp=tmp_path)
    folders = {one.env["JAX_COMPILATION_CACHE_DIR"] for one in found}
    assert len(folders) == 2


def test_a_peer_that_has_no_such_model_is_left_out(tmp_path):
    found, out = make(["litgpt", "torch"], tmp=tmp_path)
    assert [one.name for one in found] == ["lm"]
    assert out == [
        "litgpt is left out: litgpt has no gpt2",
        "torch is left out: torch.nn.TransformerEncoder has no gpt2",
    ]


def test_options_of_a_command(tmp_path):
    found, _ = make(["lm-full", "peft"], tmp=tmp_path, known=FINETUNING)
    assert [one.options.get("lora", False) for one in found] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hugging", "there is no peer 'hugging' here: choose from lm, hf, litgpt, torch"),
        ("hf+fast", "hf has no way 'fast' to run: compile, pure, plainheap"),
        ("hf+micro_batches=2", "hf has no way 'micro_batches=2' to run"),
        ("hf+XLA_FLAGS=x", "hf has no way 'XLA_FLAGS=x' to run"),
    ],
)
def test_bad_names(name, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        make([name], tmp=tmp_path)


def test_interpreters(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_PYTHON_LITGPT", sys.executable)
    assert parse_pythons([]) == {"litgpt": sys.executable}
    found, _ = make(["hf"], tmp=tmp_path, pythons=parse_pythons([f"hf={sys.executable}"]))
    assert found[1].python == sys.executable
    with pytest.raises(ValueError, match="--python takes PEER=PATH"):
        parse_pythons(["litgpt"])
    with pytest.raises(ValueError, match="of hf is not there"):
        parse_pythons(["hf=/no/such/python"])
