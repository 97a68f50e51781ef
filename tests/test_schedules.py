"""Tests of noise schedules: closed forms in 50 digits, diffusers and denoising-diffusion-pytorch."""

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest

from ddpm_fast.config import SamplerConfig
from ddpm_fast.schedules import (
    BETA_SCHEDULES,
    betas_from_list,
    linear,
    rescale_zero_terminal_snr,
    scaled_linear,
    sigmoid,
    sigmoid_alpha_bar,
    squaredcos_cap_v2,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusers.json").read_text())
NAMES = tuple(BETA_SCHEDULES)
ENDS = (1e-4, 0.02)


def alpha_bars(betas):
    return np.cumprod(1 - betas)


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def test_every_schedule_is_here():
    assert NAMES == ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "sigmoid_alpha_bar")


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_betas_are_variances(name, steps):
    betas = BETA_SCHEDULES[name](steps, *ENDS)
    assert betas.dtype == np.float64
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas < 1))
    assert np.all(np.diff(alpha_bars(betas)) < 0)


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "sigmoid_alpha_bar"])
def test_end_points_unused(name):
    assert np.array_equal(BETA_SCHEDULES[name](20, *ENDS), BETA_SCHEDULES[name](20, 0.3, 0.4))


def test_linear():
    betas = linear(1000, *ENDS)
    expected = [float(mpmath.mpf("1e-4") + mpmath.mpf("0.0199") * t / 999) for t in range(1000)]
    np.testing.assert_allclose(betas, expected, rtol=1e-14)  # allows a few roundings


def test_scaled_linear():
    betas = scaled_linear(1000, 0.00085, 0.012)
    low, high = mpmath.sqrt(mpmath.mpf("0.00085")), mpmath.sqrt(mpmath.mpf("0.012"))
    expected = [float((low + (high - low) * t / 999) ** 2) for t in range(1000)]
    np.testing.assert_allclose(betas, expected, rtol=1e-14)  # allows a few roundings


def test_sigmoid():
    betas = sigmoid(1000, *ENDS)
    expected = [
        float(mpmath.mpf("0.0199") / (1 + mpmath.exp(6 - mpmath.mpf(12) * t / 999)) + mpmath.mpf("1e-4"))
        for t in range(1000)
    ]
    np.testing.assert_allclose(betas, expected, rtol=1e-14)  # allows a few roundings


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_squaredcos(steps):
    def root(t):
        return mpmath.cos((mpmath.mpf(t) / steps + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2)

    alpha_bar = alpha_bars(squaredcos_cap_v2(steps, *ENDS))
    # beta is capped at 0.999 in the last step alone.
    expected = [float((root(t + 1) / root(0)) ** 2) for t in range(steps - 1)]
    expected.append((expected[-1] if expected else 1) * 0.001)
    # 1 - beta rounds at 1e-16, but is only 1e-3 in the last steps.
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_sigmoid_alpha_bar(steps):
    def logistic(x):
        return 1 / (1 + mpmath.exp(-mpmath.mpf(x)))

    alpha_bar = alpha_bars(sigmoid_alpha_bar(steps, *ENDS))
    span = logistic(3) - logistic(-3)
    expected = [float((logistic(3) - logistic(mpmath.mpf(6 * t) / steps - 3)) / span) for t in range(1, steps)]
    expected.append((expected[-1] if expected else 1) * 0.001)  # the last beta is capped at 0.999
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-12)  # as above


def test_sigmoid_alpha_bar_as_in_denoising_diffusion_pytorch():
    # Version 2.3.4, sigmoid_beta_schedule(1000). It rounds sigmoid(-3) and sigmoid(3) to float32, which moves
    # alpha_bar by up to 8e-9: 3e-5 of it at timestep 998.
    golden = {
        0: 0.99969972080259, 1: 0.99939780737131, 2: 0.9990942518075, 10: 0.99660573389243, 100: 0.96000047656471,
        250: 0.84986301035257, 500: 0.49834282178967, 750: 0.1481596876066, 900: 0.038988577542604,
        990: 0.0027620198333538, 998: 0.00030028698679997, 999: 3.0028698679997e-07,
    }  # fmt: skip
    alpha_bar = alpha_bars(sigmoid_alpha_bar(1000, *ENDS))
    np.testing.assert_allclose(alpha_bar[list(golden)], list(golden.values()), rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("case", GOLDEN["alphas_cumprod"], ids=lambda case: case.replace(" ", "-"))
def test_as_in_diffusers(case):
    name, *zero_snr = case.split()
    config = SamplerConfig(beta_schedule=name, rescale_betas_zero_snr=bool(zero_snr), prediction_type="sample")
    alpha_bar = config.alphas_cumprod()[GOLDEN["indices"]]
    # Its float32 product: 1000 factors, each rounded at 6e-8, mostly cancelling. zero_snr adds a difference of roots.
    # The cosine's last factor, 0.001, is rounded at 6e-8 of 1.
    np.testing.assert_allclose(alpha_bar[:-1], GOLDEN["alphas_cumprod"][case][:-1], rtol=2e-5)
    np.testing.assert_allclose(alpha_bar[-1], GOLDEN["alphas_cumprod"][case][-1], rtol=1e-4)


def test_given_betas_are_kept():
    assert betas_from_list([0.1, 0.2, 0.3], 3).tolist() == [0.1, 0.2, 0.3]
    assert betas_from_list(np.array([0.1, 0.2], dtype=np.float32), 2).dtype == np.float64
    assert betas_from_list([0.5, 1.0], 2).tolist() == [0.5, 1.0]  # zero terminal SNR


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.2], r"must be num_train_timesteps = 3 numbers in one dimension, got shape \(2,\)"),
        ([[0.1, 0.2, 0.3]], r"got shape \(1, 3\)"),
        ([], r"got shape \(0,\)"),
        ([0.1, 0.0, 0.3], "must lie between 0 and 1, got 0.0 at timestep 1"),
        ([-0.1, 0.2, 0.3], "got -0.1 at timestep 0"),
        ([0.1, 1.0, 0.3], "got 1.0 at timestep 1"),
        ([0.1, 1.0, 1.0], "got 1.0 at timestep 1"),
        ([0.1, 0.2, 1.1], "got 1.1 at timestep 2"),
        ([0.1, float("nan"), 0.3], "got nan at timestep 1"),
        ([0.1, 0.2, float("inf")], "got inf at timestep 2"),
    ],
    ids=["short", "2d", "empty", "zero", "negative", "one-inside", "two-ones", "above", "nan", "inf"],
)
def test_bad_betas(betas, message):
    with pytest.raises(ValueError, match=f"trained_betas .*{message}"):
        betas_from_list(betas, 3)


@pytest.mark.parametrize("steps", [2, 10, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name, steps):
    betas = BETA_SCHEDULES[name](steps, *ENDS)
    before, after = np.sqrt(alpha_bars(betas)), np.sqrt(alpha_bars(rescale_zero_terminal_snr(betas)))
    assert after[-1] == 0
    # sqrt(alpha_bar) is shifted and scaled, its first value kept. 1 - beta rounds at 1e-16 of 1, and the last
    # factors are small: all differences are below 1e-13.
    np.testing.assert_allclose(after, before[0] * (before - before[-1]) / (before[0] - before[-1]), atol=1e-13)
    assert after[0] == pytest.approx(before[0], rel=1e-15)
    assert np.all(np.diff(after) < 0)
