"""Tests of the ideal denoiser: against sums in 50 digits, its own score, and sampling that returns the data."""

import mpmath
import numpy as np
import pytest
import torch

from ddpm_fast.config import PREDICTION_TYPES, SamplerConfig
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.reference import Diffusion

CONFIG = SamplerConfig()
ALPHA_BARS = torch.from_numpy(CONFIG.alphas_cumprod())
TIMESTEPS = [0, 1, 10, 100, 300, 500, 800, 999]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(data, t, seed=1):
    """Return x_t of every row of the data."""
    return ALPHA_BARS[t].sqrt() * data + (1 - ALPHA_BARS[t]).sqrt() * randn(seed, *data.shape)


@pytest.fixture(scope="module")
def data():
    return randn(0, 6, 2, 3).clamp(-1, 1)


def at(t, x):
    return torch.full((len(x),), t)


def brute_force(data, x, alpha_bar):
    """Return the posterior weights and mean for one x, term by term in 50 digits."""
    with mpmath.workdps(50):
        alpha_bar = mpmath.mpf(float(alpha_bar))
        rows = [[mpmath.mpf(value) for value in row.tolist()] for row in data.flatten(1)]
        point = [mpmath.mpf(value) for value in x.flatten().tolist()]
        likelihood = [
            mpmath.exp(
                -mpmath.fsum((p - mpmath.sqrt(alpha_bar) * r) ** 2 for p, r in zip(point, row, strict=True))
                / (2 * (1 - alpha_bar))
            )
            for row in rows
        ]
        total = mpmath.fsum(likelihood)
        weights = [value / total for value in likelihood]
        mean = [mpmath.fsum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(len(point))]
        return np.array(weights, dtype=float), np.array(mean, dtype=float)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_against_50_digits(data, t):
    model = IdealDenoiser(data, ALPHA_BARS, "sample")
    x = noisy(data, t)
    weights, x0 = model.weights(x, at(t, x)), model(x, at(t, x))
    for i in range(len(x)):
        exact_weights, exact_x0 = brute_force(data, x[i], ALPHA_BARS[t])
        # At t = 0 exponents reach 1e5 and round at 1e-16 of that: weights between 0 and 1 are off by 1e-11.
        np.testing.assert_allclose(weights[i].numpy(), exact_weights, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(x0[i].flatten().numpy(), exact_x0, rtol=1e-10, atol=1e-14)


def test_between_two_rows_at_t_0():
    """Check points halfway between two rows and near it, where the exponents are largest and no weight is 0 or 1."""
    data = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    model = IdealDenoiser(data, ALPHA_BARS, "sample")
    for shift in (0.0, 1e-6, 1e-5, -1e-4):
        x = torch.tensor([[shift, -1.0]], dtype=torch.float64)
        weights, x0 = brute_force(data, x[0], ALPHA_BARS[0])
        assert 0.01 < weights[0] < 0.99
        np.testing.assert_allclose(model.weights(x, at(0, x))[0].numpy(), weights, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(model(x, at(0, x))[0].numpy(), x0, rtol=1e-9, atol=1e-11)


def test_weights_are_probabilities(data):
    model = IdealDenoiser(data, ALPHA_BARS)
    for t in TIMESTEPS:
        x = noisy(data, t)
        weights = model.weights(x, at(t, x))
        assert weights.shape == (6, 6)
        assert weights.dtype == torch.float64
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-14, atol=0)


def test_t_0_is_almost_the_data(data):
    model = IdealDenoiser(data, ALPHA_BARS, "sample")
    x = noisy(data, 0)  # noise of deviation 0.01; the rows are 1 apart
    torch.testing.assert_close(model(x, at(0, x)), data, rtol=0, atol=1e-12)


def test_pure_noise_is_almost_the_mean(data):
    model = IdealDenoiser(data, ALPHA_BARS, "sample")
    x = noisy(data, 999)
    # The signal is sqrt(alpha_bar) = 6e-3 times distances of about 2: the weights differ by a few percent.
    torch.testing.assert_close(model(x, at(999, x)), data.mean(0).expand_as(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_predictions_mean_the_same_origin(data, t):
    chain = Diffusion(torch.from_numpy(CONFIG.betas()))
    x = noisy(data, t)
    predictions = [
        chain.predict_x_0(x, t, IdealDenoiser(data, ALPHA_BARS, prediction)(x, at(t, x)), prediction)
        for prediction in ("sample", "epsilon", "v_prediction")
    ]
    # epsilon is divided by sqrt(alpha_bar) = 6e-3 at t = 999
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(predictions[2], predictions[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("t", [10, 300, 800])
def test_epsilon_is_the_score(data, t):
    """Check epsilon = -sqrt(1 - alpha_bar) grad log q(x_t) by autograd, with q(x_t) a mixture of Gaussians."""
    x = noisy(data, t).requires_grad_()
    alpha_bar = ALPHA_BARS[t]
    distances = (x[:, None] - alpha_bar.sqrt() * data).flatten(2).square().sum(2)
    log_q = (-distances / (2 * (1 - alpha_bar))).logsumexp(1)
    (score,) = torch.autograd.grad(log_q.sum(), x)
    epsilon = IdealDenoiser(data, ALPHA_BARS)(x.detach(), at(t, x))
    torch.testing.assert_close(epsilon, -(1 - alpha_bar).sqrt() * score, rtol=1e-10, atol=1e-12)


def test_a_timestep_a_sample(data):
    model = IdealDenoiser(data, ALPHA_BARS)
    x, t = noisy(data, 300), torch.tensor([0, 5, 50, 300, 700, 999])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(x, t), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (1, 8), (3, 2, 2), (1, 2, 3, 2)], ids=str)
def test_any_rank(shape):
    data = randn(3, 5, *shape)
    x = randn(4, 2, *shape)
    output = IdealDenoiser(data, ALPHA_BARS, "sample")(x, at(200, x))
    assert output.shape == x.shape
    for i in range(2):
        _, x0 = brute_force(data, x[i], ALPHA_BARS[200])
        np.testing.assert_allclose(output[i].flatten().numpy(), x0, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_x_comes_back(data, dtype, prediction):
    model = IdealDenoiser(data.float(), ALPHA_BARS.float(), prediction)
    x = noisy(data, 300).to(dtype)
    output = model(x, at(300, x))
    assert output.dtype == dtype
    # The model computes in float64 and rounds once.
    assert torch.equal(output, model(x.double(), at(300, x)).to(dtype))


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 999])
def test_extremes_are_finite(data, t, prediction):
    model = IdealDenoiser(data, ALPHA_BARS, prediction)
    for scale in (0.0, 1.0, 1e3, 1e6):
        x = (scale * randn(5, 4, 2, 3)).float()
        assert torch.isfinite(model(x, at(t, x))).all()
        assert (model.weights(x, at(t, x)).sum(1) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_terminal_snr_knows_nothing(data, prediction):
    config = SamplerConfig(rescale_betas_zero_snr=True, prediction_type=prediction)
    model = IdealDenoiser(data, config.alphas_cumprod(), prediction)
    x = randn(6, 4, 2, 3)
    sign = 1 if prediction == "sample" else -1  # v = -x_0 where alpha_bar = 0
    torch.testing.assert_close(model(x, at(999, x)), sign * data.mean(0).expand_as(x), rtol=1e-14, atol=1e-15)


def test_one_row_of_data():
    data = randn(0, 1, 3)
    model = IdealDenoiser(data, ALPHA_BARS, "sample")
    x = randn(1, 4, 3)
    assert torch.equal(model(x, at(500, x)), data.expand(4, 3))


def test_sampling_returns_rows_of_the_data():
    data = torch.tensor([[-0.8, 0.1], [0.5, 0.7], [0.4, -0.6]], dtype=torch.float64)
    chain = Diffusion(torch.from_numpy(CONFIG.betas())).respaced(range(0, 1000, 10))
    model = IdealDenoiser(data, ALPHA_BARS)
    n = 900
    x = chain.sample(model, randn(0, n, 2), randn(1, 100, n, 2))[-1]
    distance, nearest = torch.cdist(x, data).min(1)
    # The last step returns E[x_0 | x_0 + noise of deviation 0.01]: a row, unless the run ends between two rows.
    assert distance.max() < 1e-6
    # Each row has a third: standard deviation 14, five of which are allowed.
    assert (nearest.bincount(minlength=3) - n / 3).abs().max() < 71


def test_unknown_prediction():
    with pytest.raises(ValueError, match=r"prediction_type must be one of \['epsilon', .*\], got 'noise'"):
        IdealDenoiser(torch.zeros(2, 3), ALPHA_BARS, "noise")
