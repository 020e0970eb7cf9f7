"""The harness: who runs when, what is compared with what, and who cannot take part."""

import pytest

from benchmarks.harness import Contestant, Race, race, ratios, spread

TOYS = "tests.benchmarks.toys"


def sleeper(name: str, seconds: float, value: float = 1.0) -> Contestant:
    return Contestant(name, f"{TOYS}:sleeper", {"seconds": seconds, "value": value})


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def done() -> Race:
    """Two that can, and three that cannot."""
    said: list[str] = []
    found = race(
        [
            sleeper("a", 0.02),
            Contestant("gone", f"{TOYS}:absent"),
            Contestant("broken", f"{TOYS}:broken"),
            Contestant("dies", f"{TOYS}:dies"),
            sleeper("b", 0.04, 2.0),
        ],
        phases={"one": {"times": 1}, "two": {"times": 2}},
        rounds=3,
        seconds=0.05,
        echo=said.append,
    )
    assert all(sentence in said for sentence in found.absent)
    return found


def test_rounds_go_forth_and_back(done):
    order = [(block["contestant"], block["phase"]) for block in done.blocks]
    a, b = [("a", "one"), ("a", "two")], [("b", "one"), ("b", "two")]
    assert order == a + b + b + a + a + b


def test_times_and_ratios(done):
    for phase, times in (("one", 1), ("two", 2)):
        assert min(done.times("a", phase).values()) >= 0.02 * times
        assert min(done.times("b", phase).values()) >= 0.04 * times
        assert len(ratios(done, phase, "b", "a")) == 3
        # Sleeping takes longer on a busy machine, and never less than was asked for.
        assert all(value > 1 for value in ratios(done, phase, "b", "a"))


def test_a_report_has_what_is_compared(done):
    assert list(done.contestants) == ["a", "b"]
    report = done.contestants["b"]
    assert report["warm"]["one"]["values"] == [2.0, 2.0, 2.0]
    assert report["facts"]["tokens"] == 100
    assert report["first_seconds"] >= 0.04
    assert report["peak_rss"] > 1 << 20
    assert all(block["cpu_seconds"] >= 0 and block["others"] >= 0 for block in done.blocks)


def test_those_that_cannot_take_part_are_named(done):
    gone, broken, dies = done.absent
    assert "gone is left out" in gone and "a_package_that_nobody_has" in gone
    assert "pip install -e '.[bench]'" in gone
    assert broken == "broken is left out: it failed with RuntimeError: out of order"
    assert "dies" in dies and "killed by something" in dies


def test_an_interpreter_that_does_not_run():
    done = race([Contestant("x", "nothing:at_all", python="/no/such/python")], echo=silent)
    assert done.absent == ["x is left out: /no/such/python does not run"]


def test_one_core_and_phases_of_its_own():
    own = {"other": {}}
    one = Contestant("one", f"{TOYS}:sleeper", {"seconds": 0.0}, cores=1, phases=own)
    done = race([one], rounds=1, seconds=0.0, echo=silent)
    assert done.contestants["one"]["facts"]["cores"] == 1
    assert [block["phase"] for block in done.blocks] == ["other"]


def test_ratios_are_of_the_same_round():
    blocks = [
        {"contestant": name, "phase": "step", "round": number, "seconds": seconds, "count": count}
        for name, number, seconds, count in (
            ("ours", 0, 2.0, 2),
            ("theirs", 0, 3.0, 1),
            ("theirs", 1, 9.0, 1),
            ("ours", 1, 3.0, 1),
            ("theirs", 2, 1.0, 1),
        )
    ]
    assert ratios(Race(blocks=blocks), "step", "theirs", "ours") == [3.0, 3.0]


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
