"""Tests of SamplerConfig: allowed values, error messages, and the round trip through JSON."""

import dataclasses
import json
import re

import numpy as np
import pytest

from ddpm_fast.config import (
    DDIM_DIRECTIONS,
    NOISE_FREE,
    PREDICTION_TYPES,
    PREVIOUS_TIMESTEPS,
    SAMPLERS,
    VARIANCE_TYPES,
    SamplerConfig,
)
from ddpm_fast.schedules import BETA_SCHEDULES
from ddpm_fast.timesteps import TIMESTEP_SPACINGS

CHOICES = {
    "beta_schedule": tuple(BETA_SCHEDULES),
    "prediction_type": PREDICTION_TYPES,
    "variance_type": VARIANCE_TYPES,
    "sampler": SAMPLERS,
    "ddim_direction": DDIM_DIRECTIONS,
    "timestep_spacing": tuple(TIMESTEP_SPACINGS),
    "previous_timestep": PREVIOUS_TIMESTEPS,
    "noise_free": NOISE_FREE,
}
SWITCHES = ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "thresholding")


def test_default_is_every_step_of_ddpm():
    config = SamplerConfig()
    assert config.num_inference_steps is None
    assert config.inference_timesteps().tolist() == list(range(1000))[::-1]
    assert config.betas()[0] == pytest.approx(1e-4)
    assert config.betas()[-1] == pytest.approx(0.02)
    assert (config.sampler, config.variance_type, config.prediction_type) == ("ddpm", "fixed_small", "epsilon")


def test_fewer_training_steps_are_all_taken():
    assert SamplerConfig(num_train_timesteps=7).inference_timesteps().tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_alphas_cumprod():
    config = SamplerConfig(trained_betas=[0.5, 0.25, 0.75], num_train_timesteps=3)
    assert config.alphas_cumprod().tolist() == [0.5, 0.375, 0.09375]  # exact in binary
    assert config.alphas_cumprod().dtype == np.float64


@pytest.mark.parametrize("name", CHOICES)
def test_choices_accepted(name):
    for value in CHOICES[name]:
        assert getattr(SamplerConfig(**{name: value}), name) == value


@pytest.mark.parametrize("bad", ["eps", "", None, 3], ids=repr)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_refused(name, bad):
    with pytest.raises(ValueError) as error:
        SamplerConfig(**{name: bad})
    assert str(error.value) == f"{name} must be one of {list(CHOICES[name])}, got {bad!r}"


@pytest.mark.parametrize("bad", ["yes", None, 2], ids=repr)
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_refused(name, bad):
    with pytest.raises(ValueError) as error:
        SamplerConfig(**{name: bad})
    assert str(error.value) == f"{name} must be one of [True, False], got {bad!r}"


@pytest.mark.parametrize(
    ("name", "good", "bad", "span"),
    [
        ("beta_start", [1e-9, 0.3], [0.0, 1.0, -0.1, 2, "0.1", True, None], "in (0, 1)"),
        ("beta_end", [1e-9, 0.3], [0.0, 1.0, float("nan")], "in (0, 1)"),
        ("temperature", [0, 0.9, 2.5], [-1e-9, float("nan"), float("inf"), "1", False], "in [0, inf)"),
        ("clip_sample_range", [1e-9, 5], [0.0, -1.0, float("inf"), None], "in (0, inf)"),
        ("dynamic_thresholding_ratio", [0.5, 1], [0.0, 1.001], "in (0, 1]"),
        ("sample_max_value", [1, 100.0], [0.999, float("inf")], "in [1, inf)"),
    ],
    ids=["beta_start", "beta_end", "temperature", "clip_range", "ratio", "max_value"],
)
def test_numbers(name, good, bad, span):
    for value in good:
        assert getattr(SamplerConfig(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError) as error:
            SamplerConfig(**{name: value})
        assert str(error.value) == f"{name} must be a finite number {span}, got {value!r}"


def test_eta():
    for eta in (0, 0.5, 1.0):
        assert SamplerConfig(sampler="ddim", eta=eta).eta == eta
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"eta must be a finite number in [0, 1], got {eta}")):
            SamplerConfig(sampler="ddim", eta=eta)
    with pytest.raises(ValueError, match=r"eta belongs to sampler='ddim', got eta=0.5 with sampler='ddpm'"):
        SamplerConfig(eta=0.5)


@pytest.mark.parametrize("offset", [-1, 0.5, None, "x"], ids=repr)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_steps_offset(spacing, offset):
    with pytest.raises(ValueError, match="steps_offset must be an integer >= 0"):
        SamplerConfig(timestep_spacing=spacing, steps_offset=offset)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trained_betas": [0.1, 0.2, 1.0]}, "no signal at the last timestep"),
        ({"beta_start": 0.9, "beta_end": 0.9}, "no signal at the last timestep"),
        ({"trained_betas": [1e-17, 0.2, 0.3]}, "the first beta is so small that nothing is added to x_0"),
        ({"trained_betas": 0.1}, "trained_betas must be num_train_timesteps"),
        ({"trained_betas": ["a"]}, "trained_betas must be numbers"),
        ({"trained_betas": [[0.1, 0.2, 0.3]]}, r"one dimension, got shape \(1, 3\)"),
        ({"timesteps": 5}, "timesteps must be a non-empty list of integers, got 5"),
    ],
    ids=["last beta 1", "underflow", "tiny", "a number", "text", "2-D", "one timestep"],
)
def test_senseless_schedules(options, says):
    betas = options.get("trained_betas")
    count = len(betas) if isinstance(betas, list) and len(betas) == 3 else 3 if betas is not None else 1000
    with pytest.raises(ValueError, match=says):
        SamplerConfig(num_train_timesteps=count, **options)


def test_zero_snr_of_one_timestep():
    with pytest.raises(ValueError, match="at least two timesteps"):
        SamplerConfig(num_train_timesteps=1, rescale_betas_zero_snr=True, prediction_type="sample")


def test_numpy_values_become_plain_ones():
    config = SamplerConfig(
        num_inference_steps=np.int64(2), timesteps=np.array([9, 3], np.uint8), temperature=np.float32(0.5),
        clip_sample=np.True_,
    )  # fmt: skip
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config.timesteps == (9, 3)
    assert type(config.temperature) is float


def test_options_replace_what_they_contradict_in_the_base():
    base = SamplerConfig(timesteps=[9, 3])
    assert len(SamplerConfig.from_options({"num_inference_steps": 10}, base).inference_timesteps()) == 10
    counted = SamplerConfig(num_inference_steps=10)
    assert SamplerConfig.from_options({"timesteps": [5]}, counted).inference_timesteps().tolist() == [5]


@pytest.mark.parametrize("bad", [0, -5, 2.0, "10", True], ids=repr)
@pytest.mark.parametrize("name", ["num_inference_steps", "num_train_timesteps"])
def test_counts(name, bad):
    with pytest.raises(ValueError) as error:
        SamplerConfig(**{name: bad})
    assert str(error.value) == f"{name} must be an integer >= 1, got {bad!r}"


def test_more_steps_than_the_schedule_has():
    assert len(SamplerConfig(num_inference_steps=1000).inference_timesteps()) == 1000
    with pytest.raises(
        ValueError, match=r"^num_inference_steps=1001 is more than the schedule has: num_train_timesteps=1000$"
    ):
        SamplerConfig(num_inference_steps=1001)


def test_zero_terminal_snr_needs_another_prediction():
    for prediction in ("sample", "v_prediction"):
        config = SamplerConfig(rescale_betas_zero_snr=True, prediction_type=prediction)
        assert config.alphas_cumprod()[-1] == 0
    with pytest.raises(ValueError, match=r"an 'epsilon' prediction says nothing .* 'v_prediction' or 'sample'"):
        SamplerConfig(rescale_betas_zero_snr=True)


def test_explicit_timesteps():
    assert SamplerConfig(timesteps=[999, 3]).inference_timesteps().tolist() == [999, 3]
    assert SamplerConfig(timesteps=range(8, 0, -4), num_inference_steps=2).inference_timesteps().tolist() == [8, 4]
    with pytest.raises(ValueError, match=r"^num_inference_steps=3 contradicts .*2.* timesteps"):
        SamplerConfig(timesteps=[999, 3], num_inference_steps=3)
    with pytest.raises(ValueError, match="timesteps must descend strictly"):
        SamplerConfig(timesteps=[3, 999])
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 9\], got 10"):
        SamplerConfig(timesteps=[10, 3], num_train_timesteps=10)


def test_given_betas_are_checked_at_once():
    with pytest.raises(ValueError, match=r"trained_betas must be num_train_timesteps = 1000 .* got shape \(2,\)"):
        SamplerConfig(trained_betas=[0.1, 0.2])


def test_from_options():
    assert SamplerConfig.from_options({}) == SamplerConfig()
    base = SamplerConfig(sampler="ddim", num_inference_steps=50)
    changed = SamplerConfig.from_options({"eta": 0.5}, base)
    assert (changed.sampler, changed.num_inference_steps, changed.eta) == ("ddim", 50, 0.5)
    assert base.eta == 0
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        SamplerConfig.from_options({"prediction_type": "eps"})


def test_unknown_option_names_the_nearest():
    with pytest.raises(TypeError) as error:
        SamplerConfig.from_options({"num_inference_step": 50})
    names = sorted(field.name for field in dataclasses.fields(SamplerConfig))
    assert str(error.value) == (
        f"unknown option 'num_inference_step'; did you mean 'num_inference_steps'? allowed are {names}"
    )
    with pytest.raises(TypeError, match=r"unknown option 'zzz'; allowed are \['beta_end'"):
        SamplerConfig.from_options({"zzz": 1})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 50, "sampler": "ddim", "eta": 0.25},
        {"timesteps": (999, 500, 0)},
        {"timesteps": range(6, -1, -3)},
        {"trained_betas": np.linspace(0.1, 0.3, 4), "num_train_timesteps": 4},
        {"trained_betas": np.linspace(0.1, 0.3, 4, dtype=np.float32), "num_train_timesteps": 4},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=["default", "ddim", "timesteps", "range", "betas", "float32-betas", "zero-snr"],
)
def test_through_json(options):
    config = SamplerConfig(**options)
    again = SamplerConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert np.array_equal(again.betas(), config.betas())


def test_to_dict_has_every_field():
    assert list(SamplerConfig().to_dict()) == [field.name for field in dataclasses.fields(SamplerConfig)]


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplerConfig().eta = 1.0
