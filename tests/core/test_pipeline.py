"""Schedules of pipelines: every job once, after what it needs, and as few idle ticks as claimed."""

from fractions import Fraction

import numpy as np
import pytest

from lm.core.pipeline import Pipeline, Schedule

SHAPES = [(1, 3, 1), (2, 2, 1), (4, 3, 1), (4, 8, 1), (8, 64, 1), (2, 2, 2), (4, 8, 2), (4, 4, 5)]


@pytest.mark.parametrize("stages, parts, chunks", SHAPES)
def test_every_job_once_after_what_it_needs(stages, parts, chunks):
    """By the table: a micro-batch meets all runs of layers in order, each one tick after the last.

    Its next stage is the next one of the ring, so that an activation is sent once and never waits.
    """
    found = {}
    table = Schedule(stages, parts, chunks).table()
    for tick, row in enumerate(table):
        assert len(row) == stages
        for stage, cell in enumerate(row):
            if cell is not None:
                micro, chunk = cell
                assert (micro, chunk * stages + stage) not in found
                found[micro, chunk * stages + stage] = tick
    assert set(found) == {(m, run) for m in range(parts) for run in range(stages * chunks)}
    for (micro, run), tick in found.items():
        assert run == 0 or found[micro, run - 1] == tick - 1


@pytest.mark.ledger("P073", "L29")
@pytest.mark.parametrize("stages, parts, chunks", SHAPES)
def test_bubble_is_the_closed_form(stages, parts, chunks):
    """(p - 1) / (m + p - 1) for GPipe and (p - 1) / (v m + p - 1) interleaved, exactly."""
    schedule = Schedule(stages, parts, chunks)
    assert schedule.num_ticks == len(schedule.table()) == chunks * parts + stages - 1
    assert schedule.bubble() == Fraction(stages - 1, chunks * parts + stages - 1)


def test_jobs_of_arrays_are_those_of_numbers():
    schedule = Schedule(4, 8, 2)
    tick, stage = np.mgrid[: schedule.num_ticks, :4]
    busy, micro, chunk = schedule.job(tick, stage)
    for t, row in enumerate(schedule.table()):
        for s, cell in enumerate(row):
            assert cell == ((micro[t, s], chunk[t, s]) if busy[t, s] else None)


def test_micro_batches_that_nobody_chose():
    assert Pipeline().over(4, 64).micro_batches == 16
    assert Pipeline().over(4, 24).micro_batches == 8
    assert Pipeline().over(4, 24, shards=2).micro_batches == 4
    assert Pipeline(6).over(4, 24).micro_batches == 6


def test_refusals():
    with pytest.raises(ValueError, match=r"24 rows .* into 5 micro-batches .* over 1 dev"):
        Pipeline(5).over(2, 24)
    with pytest.raises(ValueError, match=r"24 rows .* into 8 micro-batches .* over 2 dev"):
        Pipeline(8).over(2, 24, shards=2)
    with pytest.raises(ValueError, match="groups of one for each of 4 stages, and 6 are no mult"):
        Pipeline(6, chunks=2).over(4, 24)
    with pytest.raises(ValueError, match="chunks of a pipeline is 1 or more, not 0"):
        Pipeline(chunks=0)
