"""What is written down of a race."""

import json

import pytest

from benchmarks import machine
from benchmarks.command import check_losses
from benchmarks.decode import agreement, both_rows
from benchmarks.finetune import inverse
from benchmarks.harness import Race
from benchmarks.report import figure, limits, ranged, rows, write
from benchmarks.train import show, verdict, with_rates


def block(name, number, seconds, others=0.0, phase="step", values=(0,)):
    return dict(
        contestant=name, phase=phase, round=number, seconds=seconds, count=1, others=others,
        values=list(values), cpu_seconds=2 * seconds,
    )  # fmt: skip


def report(values=(3.0,), peak=10**9, phase="step", **facts):
    return {
        "facts": {"tokens": 100, "settings": "as it comes", **facts},
        "versions": {"jax": "0.0"},
        "import_seconds": 0.5,
        "first_seconds": 2.0,
        "peak_rss": peak,
        "warm": {phase: {"values": list(values)}},
    }


@pytest.fixture
def done() -> Race:
    rates = {"fp32": 100.0, "bf16": 200.0, "read": 10.0, "copy": 12.0}
    return Race(
        {
            "lm": report(flops=50e9, values=(4.0, 3.9)),
            "hf": report(peak=2 * 10**9, values=(4.0002, 3.9)),
            "other": report(values=(5.0, 4.9)),
            "limits": report(values=()),
        },
        [
            *(block("lm", number, 1.0, others=1.5 if number else 0.0) for number in range(3)),
            *(block("hf", number, seconds) for number, seconds in enumerate((2.0, 3.0, 2.5))),
            *(block("other", number, 4.0) for number in range(3)),
            block("limits", 0, 1.0, values=[rates]),
        ],
        ["litgpt is left out: it is not there"],
    )


def test_rows(done):
    found = {row["contestant"]: row for row in rows(done, "step", "lm")}
    assert list(found) == ["lm", "hf", "other"]
    assert "ratio" not in found["lm"]
    # Ours was disturbed in two rounds of three, which do not count.
    assert found["hf"]["ratio"] == {
        "median": 2.0, "least": 2.0, "most": 2.0, "rounds": 1, "disturbed": False
    }  # fmt: skip
    assert found["hf"]["cpu_ratio"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert (found["lm"]["quiet"], found["lm"]["blocks"]) == (1, 3)
    assert found["lm"]["others"] == 1.5


def test_where_every_round_was_disturbed(done):
    done.blocks[0]["others"] = 1.0
    ratio = rows(done, "step", "lm")[1]["ratio"]
    assert (ratio["median"], ratio["rounds"], ratio["disturbed"]) == (2.5, 3, True)
    assert ranged(ratio) == "2.50 (2.00-3.00) disturbed"


def test_rates_and_the_best_peer(done):
    assert limits(done)["fp32"] == 100.0
    found = with_rates(done, rows(done, "step", "lm"), "fp32")
    assert found[0]["tokens_per_second"] == 100.0
    assert found[0]["mfu"] == 0.5
    assert found[1]["mfu"] == 0.2  # The operations are those of ours, whoever does them.
    assert "hf, a step of ours is 2.00 (2.00-2.00) times as fast" in verdict(found, "step")
    assert "| hf | 2.5 | 40 | 2.00 (2.00-2.00) | 5 | 2.50 (2.00-3.00) | 20% | 2.00 |" in show(found)


def test_another_loss_is_another_computation(done):
    lines, wrong = check_losses(done, "fp32")
    assert wrong == ["other"]
    assert "NOT THE SAME COMPUTATION" in lines[1]
    assert "5.0e-05 from ours" in lines[0]


def test_a_loss_that_is_no_number_is_another_computation(done):
    done.contestants["hf"] = report(values=(float("nan"),))
    assert "hf" in check_losses(done, "fp32")[1]


def test_decoding(done):
    first, whole = "batch 2: first token", "batch 2: whole"
    tokens = {"lm": [[[1, 2], [3, 4]]], "hf": [[[1, 2], [3, 9]]]}
    race = Race(
        {
            name: {**report(bytes=10**9), "warm": {whole: {"values": values}}}
            for name, values in tokens.items()
        },
        [
            *(block(name, 0, 1.0, phase=first) for name in tokens),
            block("lm", 0, 2.0, phase=whole),
            block("hf", 0, 3.0, phase=whole),
            *(b for b in done.blocks if b["contestant"] == "limits"),
        ],
    )
    ours, theirs = both_rows(race, batch=2, new=2)
    assert ours["tokens_per_second"] == 2.0
    assert ours["seconds_per_token"] == 1.0
    assert ours["bandwidth"] == pytest.approx(0.1)
    assert theirs["ratio"]["median"] == 1.5
    assert agreement(race) == ["hf, batch 2: whole: 3 of 4 tokens are those of ours"]


def test_files(done, tmp_path):
    path = write("train baby fp32", "the table", {"rows": [1]}, done, tmp_path / "new")
    text, data = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert path.name.endswith("-train-baby-fp32.md")
    for part in ("the table", "litgpt is left out", "jax 0.0", "100 GFLOP/s fp32", "cores of"):
        assert part in text
    assert data["rows"] == [1] and len(data["blocks"]) == 10
    assert data["machine"]["cores"] >= 1


def test_figures():
    assert [figure(x) for x in (12345.6, 123.4, 12.34, 0.01234)] == [
        "12,346",
        "123",
        "12.3",
        "0.0123",
    ]
    assert ranged(None) == ""
    assert inverse({"median": 2.0, "least": 1.0, "most": 4.0}) == {
        "median": 0.5, "least": 0.25, "most": 1.0
    }  # fmt: skip


def test_what_others_took():
    before = machine.read_ticks("cpu  100 0 100 1000 0 0 0 0 0 0")
    after = machine.read_ticks("cpu  400 0 200 1000 0 0 0 100 0 0")
    assert after.busy - before.busy == pytest.approx(4.0)
    assert machine.others(before, after, own=3.0, seconds=2.0) == pytest.approx(1.0)
    assert machine.others(before, after, own=9.0, seconds=2.0) == 0.0
