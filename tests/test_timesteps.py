"""Tests of the timesteps that a run visits."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.config import SamplerConfig
from ddpm_fast.timesteps import TIMESTEP_SPACINGS, check_range, explicit, leading, linspace, trailing

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusers.json").read_text())
SPACINGS = tuple(TIMESTEP_SPACINGS)


def check_spacing(timesteps, train_steps, steps):
    assert timesteps.dtype == np.int64
    assert timesteps.shape == (steps,)
    assert timesteps[0] < train_steps
    assert timesteps[-1] >= 0
    assert np.all(np.diff(timesteps) < 0)


def test_every_spacing_is_here():
    assert SPACINGS == ("leading", "trailing", "linspace")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_exactly_n_for_every_n(spacing):
    for steps in range(1, 1001):
        check_spacing(TIMESTEP_SPACINGS[spacing](1000, steps), 1000, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_exactly_n_of_any_t(spacing, data):
    train_steps = data.draw(st.integers(1, 5000))
    steps = data.draw(st.integers(1, train_steps))
    check_spacing(TIMESTEP_SPACINGS[spacing](train_steps, steps), train_steps, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("train_steps", [1, 2, 7, 1000])
def test_all_steps_are_all_timesteps(spacing, train_steps):
    assert TIMESTEP_SPACINGS[spacing](train_steps, train_steps).tolist() == list(range(train_steps))[::-1]


def test_examples():
    assert leading(1000, 4).tolist() == [750, 500, 250, 0]
    assert trailing(1000, 4).tolist() == [999, 749, 499, 249]
    assert linspace(1000, 4).tolist() == [999, 666, 333, 0]
    assert leading(1000, 501)[0] == 500  # T // N = 1: the noisier half is never visited
    assert [TIMESTEP_SPACINGS[spacing](1000, 1).tolist() for spacing in SPACINGS] == [[0], [999], [0]]


def test_trailing_always_begins_at_the_end_and_is_even():
    for steps in range(1, 1001):
        timesteps = trailing(1000, steps)
        assert timesteps[0] == 999
        # Each timestep is rounded by at most a half.
        assert np.abs(timesteps + 1 - (1000 - np.arange(steps) * 1000 / steps)).max() <= 0.5 + 1e-9


def test_linspace_has_both_ends():
    for steps in range(2, 1001):
        timesteps = linspace(1000, steps)
        assert (timesteps[0], timesteps[-1]) == (999, 0)


def summary(timesteps):
    """Return the golden file's summary of a long list: its length, ends and a checksum."""
    if len(timesteps) <= 61:
        return timesteps
    return [len(timesteps), *timesteps[:3], *timesteps[-3:], sum(i * t for i, t in enumerate(timesteps))]


@pytest.mark.parametrize(
    "case",
    GOLDEN["timesteps"],
    ids=lambda case: case.replace(" ", "-"),
)
def test_as_in_diffusers(case):
    spacing, steps = case.split()
    golden = GOLDEN["timesteps"][case]
    if case == "trailing 61":  # the float range of diffusers has a 62nd entry, -1
        assert len(golden) == 62
        assert golden[-1] == -1
        golden = golden[:-1]
    config = SamplerConfig(timestep_spacing=spacing, num_inference_steps=int(steps))
    assert summary(config.inference_timesteps().tolist()) == golden


def diffusers_trailing(steps):
    """Return diffusers' trailing timesteps, built from a float range, which round as np.arange does."""
    return np.round(np.arange(1000, 0, -1000 / steps)).astype(np.int64) - 1


def test_where_diffusers_has_one_too_many():
    longer = [steps for steps in range(1, 1001) if len(diffusers_trailing(steps)) != steps]
    assert len(longer) == 62
    assert longer[:2] == [61, 103]
    assert {(len(diffusers_trailing(steps)) - steps, diffusers_trailing(steps)[-1]) for steps in longer} == {(1, -1)}


def test_trailing_is_diffusers_otherwise():
    for steps in range(1, 1001):
        assert np.array_equal(trailing(1000, steps), diffusers_trailing(steps)[:steps]), steps


@pytest.mark.parametrize("given_as", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_explicit(given_as):
    timesteps = explicit(given_as([9, 4, 0]), 10)
    assert timesteps.dtype == np.int64
    assert timesteps.tolist() == [9, 4, 0]


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], r"must be a non-empty list of integers, got \[\]"),
        ([3.0, 1.0], r"must be a non-empty list of integers, got \[3.0, 1.0\]"),
        ([True, False], "must be a non-empty list of integers"),
        ([[3, 1]], "must be a non-empty list of integers"),
        (["3", "1"], "must be a non-empty list of integers"),
        (5, "must be a non-empty list of integers, got 5"),
        ([10, 4], r"must lie in \[0, 9\], got 10"),
        ([4, -1], r"must lie in \[0, 9\], got -1"),
        ([1, 4], r"must descend strictly, got \[1, 4\]"),
        ([4, 4, 1], r"must descend strictly, got \[4, 4, 1\]"),
    ],
    ids=["empty", "floats", "bools", "2d", "strings", "number", "above", "below", "ascending", "twice"],
)
def test_bad_explicit(timesteps, message):
    with pytest.raises(ValueError, match=f"timesteps {message}"):
        explicit(timesteps, 10)


def test_check_range():
    check_range(np.array([9, 0]), 10)
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 9\], got 10"):
        check_range(np.array([3, 10, -1]), 10)


def test_steps_offset_moves_leading_alone():
    visited = {
        spacing: SamplerConfig(num_inference_steps=50, steps_offset=1, timestep_spacing=spacing).inference_timesteps()
        for spacing in SPACINGS
    }
    assert np.array_equal(visited["leading"], leading(1000, 50) + 1)
    assert np.array_equal(visited["trailing"], trailing(1000, 50))
    assert np.array_equal(visited["linspace"], linspace(1000, 50))
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 999\]"):
        SamplerConfig(num_inference_steps=50, steps_offset=20)
