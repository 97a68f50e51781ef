"""The benchmarks of speculative sampling run, and their results fill the tables of docs/speculation.md."""

import itertools
import math
import time

import torch

from benchmarks.network import replay
from benchmarks.speculation import plot, run, tables
from ddpm_fast.kernels.rounds import Position
from ddpm_fast.models.checkpoint import load_checkpoint
from research import speculation_ideas

CPU = torch.device("cpu")


def test_ideas_are_counted():
    rows = speculation_ideas.count("digits", 1, (4,), 20)
    assert [row["idea"] for row in rows] == list(speculation_ideas.IDEAS)
    for row in rows:
        assert 5 <= row["calls_low"] <= row["calls"] <= row["calls_high"] <= 20
        assert row["volume"] == 4 * row["calls"] / 20
        assert row["rejections"] < row["calls"]


def test_arms_are_compared():
    saved = []
    arms = run.arms_of(load_checkpoint("digits"), 4, 16, CPU)
    rows = run.Comparison(arms, CPU, 4, math.inf).run(2, lambda rows: saved.append([row["seeds"] for row in rows]))
    found = {(row["policy"], row["hoisted"]): row for row in rows}
    assert set(found) == {(name, False) for name in ("sequential", "8", "by t", "measured")} | {
        (name, True) for layout in ("", ", channels_last") for name in (f"sequential{layout}", f"measured{layout}")
    }
    assert saved == [[1] * 8, [2] * 8]
    assert found["sequential", False]["faster_than_plain"]["median"] == 1
    assert found["8", False]["calls"] < 16
    assert found["8", False]["seconds"] > 0
    assert found["measured", True]["windows"] == found["measured", False]["windows"]


def test_arms_that_do_not_fit_are_not_built():
    """The sequential sampler runs all the same, once."""
    comparison = run.Comparison(run.arms_of(load_checkpoint("digits"), 4, 16, CPU), CPU, 4, time.perf_counter())
    assert not comparison.complete
    rows = comparison.run(3)
    assert [(row["policy"], row["hoisted"], row["seeds"]) for row in rows] == [
        ("sequential", False, 1), ("sequential", True, 1),
    ]  # fmt: skip


def test_frozen_guesses_are_all_equal():
    sampler = dict(run.arms_of(load_checkpoint("digits"), 1, 16, CPU))["16", "frozen", False]
    sampler(seeds=0, progress=False)
    guess = sampler.loop._guess[0]
    assert torch.equal(guess, guess[:1].expand_as(guess))


def test_calls_are_timed_by_batch_size():
    saved = []
    rows = replay.measure(CPU, (1, 2), lambda rows: saved.append(len(rows)))
    assert saved == [1, 2, 3, 4]
    assert {(row["network"], row["batch"]) for row in rows} == {
        (f"embedded {name}", batch) for name in ("moons", "digits") for batch in (1, 2)
    }
    assert all(row["single_calls"] == 1 for row in rows if row["batch"] == 1)


def test_rounds_of_the_picture_are_a_whole_run():
    found = plot.rounds()
    assert found[0][Position.START] == 0
    assert found[-1][Position.ROW] == 1000
    for one, following in itertools.pairwise(found):
        assert one[Position.ROW] == one[Position.START] + one[Position.TAKEN] == following[Position.START]


def test_every_table_is_filled():
    for name, table in tables.TABLES.items():
        lines = table().splitlines()
        assert len(lines) > 3, name
        assert len({line.count("|") for line in lines}) == 1, name
