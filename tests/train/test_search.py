"""The largest batch that fits, against trying them all."""

import math

import pytest

from lm.train.ahead import batch_shapes
from lm.train.plan import Cost, DoesNotFit
from lm.train.search import largest, largest_batches
from tests.train.test_ahead import plan_of
from tests.train.toy import toy_experiment


@pytest.mark.parametrize("unit", [1, 3, 8])
def test_equals_trying_all(unit):
    for limit in range(100):
        asked: list[int] = []

        def fits(rows: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(rows)
            return rows <= limit

        expected = max((rows for rows in range(0, limit + 1) if rows % unit == 0), default=0)
        assert largest(fits, unit) == expected
        assert len(asked) == len(set(asked)) <= 2 * math.log2(max(1, limit / unit)) + 2


def test_policies_side_by_side():
    """'none' fits in 12 rows by its plan, 'full' in 40 by its compiler; 'offload' has none."""
    experiment = toy_experiment(batch_size=8)

    def plan(changed, batch):
        config = changed.train
        assert batch.tokens.shape[0] == config.batch_size
        if config.remat == "offload":
            raise ValueError("no host to offload to")
        if config.remat == "full" and config.batch_size > 40:
            raise DoesNotFit("too large")
        room = 12 if config.remat == "none" else 10**6
        used = 32 * 2**30 * config.batch_size // room if room < 10**6 else 1
        return plan_of(Cost(used, 0, 0))

    policies, told = ("none", "full", "offload"), []
    rows = list(
        largest_batches(experiment, batch_shapes(experiment), 4, plan, policies, told.append)
    )
    assert [(row.remat, row.batch_size) for row in rows] == [
        ("none", 12), ("full", 40), ("offload", 0)
    ]  # fmt: skip
    lines = [str(row) for row in rows]
    assert "no host to offload to" in lines[2]
    assert "34.36 GB of 34.36 GB" in lines[0] and "MFU" in lines[0]
    assert told[0] == "remat none: do 4 rows fit?" and told[-1].startswith("remat offload")
