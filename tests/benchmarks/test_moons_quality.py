"""The embedded model against the data: what was measured, and a live draw."""

import json

import numpy as np
import pytest
import torch

from benchmarks.common.results import FOLDER
from benchmarks.speculation import quality as speculation_quality
from benchmarks.study import moons_statistics
from ddpm_fast.data import moons
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import sample

RESULT = FOLDER / "moons__quality.json"
COUNT = 16  # moons of the live draw


@pytest.fixture(scope="module")
def data():
    return moons_statistics.statistics_of(moons.batch(2048, seed=1_000_003))


@pytest.fixture(scope="module")
def drawn():
    checkpoint = load_checkpoint()
    images = sample(
        checkpoint.model, (COUNT, *checkpoint.shape), seeds=5000, config=checkpoint.diffusion, optimize="hoist",
        memory_format="channels_last",
    )  # fmt: skip
    return moons_statistics.statistics_of(images)


def passes(measured, data):
    """Return whether a draw is not told apart from the data, and whether its moons are sharp."""
    row = moons_statistics.compare(measured, data)
    return not row["rejected"] and row["misfit"]["median"] < 0.05


def test_a_live_draw_is_not_told_apart_from_the_data(data, drawn):
    assert len(drawn["lit"]) == COUNT
    assert passes(drawn, data), moons_statistics.compare(drawn, data)


def test_so_few_moons_tell_a_bad_model(data):
    """Draws of this size from the committed measurement: the model of 500 steps never passes, the embedded one does."""
    passed, rng = {}, np.random.default_rng(0)
    for row in json.loads(RESULT.read_text())["rows"]["models"]:
        measured = {name: np.array(values) for name, values in row["measured"].items()}
        draws = [rng.choice(row["count"], COUNT, replace=False) for _ in range(100)]
        passed[row["training"]["steps"]] = sum(passes({n: v[i] for n, v in measured.items()}, data) for i in draws)
    assert passed.pop(500) == 0
    assert min(passed.values()) >= 95


def test_the_committed_measurement_rejects_500_steps_and_keeps_the_embedded_model(data):
    models = {row["model"]: row for row in json.loads(RESULT.read_text())["rows"]["models"]}
    verdicts = {}
    for name, row in models.items():
        found = {key: np.array(values) for key, values in row["measured"].items()}
        assert len(found["lit"]) == row["count"] == 512
        verdicts[row["training"]["steps"]] = moons_statistics.compare(found, data)["rejected"]
        assert verdicts[row["training"]["steps"]] == row["rejected"], name
    embedded = load_checkpoint().about["training"]["steps"]
    assert verdicts == {embedded: False, 500: True}


def test_the_test_sees_small_faults(data):
    """Discs a pixel too small, or moons that prefer to be new, are rejected at the size of the committed draw."""
    parameters = moons.draw_parameters(512, torch.Generator().manual_seed(9))
    fair = moons_statistics.statistics_of(moons.render(parameters))
    assert not moons_statistics.compare(fair, data)["rejected"]
    shrunk = {**fair, "radius": fair["radius"] - 1}
    dim = {**fair, "lit": fair["lit"] ** 1.5}
    assert moons_statistics.compare(shrunk, data)["rejected"]
    assert moons_statistics.compare(dim, data)["rejected"]


def test_speculated_moons_are_those_of_the_sequential_sampler():
    """The committed measurement: the test is made anew from what was measured, and would see a small fault."""
    result = json.loads((RESULT.parent / "moons__speculated.json").read_text())["rows"]
    found = {name: np.array(values) for name, values in result["measured"].items()}
    assert len(found["lit"]) == result["count"] >= 192
    other = speculation_quality.sequential()
    assert len(other["lit"]) == 512
    assert speculation_quality.compare(found, other) == result["tests"]
    assert min(test["p"] for test in result["tests"].values()) > 0.001
    shrunk = {**found, "radius": found["radius"] - 1.5}
    assert speculation_quality.compare(shrunk, other)["radius"]["p"] < 0.001
    blurred = {**found, "misfit": found["misfit"] * 1.3}
    assert speculation_quality.compare(blurred, other)["misfit"]["p"] < 0.001
