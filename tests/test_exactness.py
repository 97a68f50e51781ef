"""The engine against closed forms: Gaussian data at every step, and a finite data set at the end."""

import pytest
import torch
from scipy import stats

from ddpm_fast.data import moons
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.reference import Diffusion
from ddpm_fast.sample import SamplerConfig, sample
from tests.support.networks import Gaussian

MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
ROOT = torch.tensor(
    [[1.0, 0.0, 0.0, 0.0], [0.6, 0.5, 0.0, 0.0], [-0.3, 0.2, 0.8, 0.0], [0.1, 0.0, -0.4, 0.05]], dtype=torch.float64
)
COVARIANCE = ROOT @ ROOT.T
BATCH, POSITIONS = 500, 32  # every position of every sample is a draw of its own: 16,000
DRAWS = BATCH * POSITIONS


class PerPosition(Gaussian):
    """`Gaussian` over the channels of [B, 4, POSITIONS]."""

    def forward(self, x, t):
        flat = x.transpose(1, 2).reshape(-1, 4)
        return super().forward(flat, t[:1]).view(len(x), -1, 4).transpose(1, 2)


def walk_of_moments(model, variance_type, temperature, steps):
    """Mean and covariance of x after every step, in closed form: each step is linear in x plus noise."""
    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).respaced(range(0, 1000, 1000 // steps))
    one = torch.eye(4, dtype=torch.float64)
    mean, covariance = torch.zeros(4, dtype=torch.float64), one
    for t in reversed(range(steps)):
        gain, offset = model.gain(diffusion.timesteps[t])
        # The posterior mean is linear in (x_0, x_t): its matrices are its values at unit vectors.
        along_x, _ = diffusion.q_posterior(0 * one, one, t)
        along_origin, _ = diffusion.q_posterior(one, 0 * one, t)
        step = along_x + along_origin @ gain
        variance = diffusion.p_variance(t, variance_type, torch.zeros(())) if t > 0 else 0.0
        mean = step @ mean + along_origin @ offset
        covariance = step @ covariance @ step.T + temperature**2 * variance * one
        yield mean, covariance


def distance(mean, covariance, expected):
    """Largest difference of means and of covariances, in units of the expected standard deviations."""
    expected_mean, expected_covariance = expected
    scale = expected_covariance.diagonal().sqrt()
    off = (covariance - expected_covariance) / torch.outer(scale, scale)
    return ((mean - expected_mean) / scale).abs().max(), off.abs().max()


# Standard errors in those units: 1 / sqrt(N) and at most sqrt(2 / N); five of each.
MEAN_TOLERANCE, COVARIANCE_TOLERANCE = 5 / DRAWS**0.5, 5 * (2 / DRAWS) ** 0.5


@pytest.mark.parametrize(
    ("variance_type", "temperature", "steps"),
    [("fixed_small", 1.0, 1000), ("fixed_large", 1.0, 1000), ("fixed_small", 0.5, 1000), ("fixed_large", 1.0, 25)],
)
def test_gaussian_data_have_the_closed_form_at_every_step(variance_type, temperature, steps):
    model = PerPosition(MEAN, COVARIANCE, torch.from_numpy(SamplerConfig().alphas_cumprod()))
    expected = list(walk_of_moments(model, variance_type, temperature, steps))
    worst = []

    def compare(step, t, x):
        flat = x.double().transpose(1, 2).reshape(-1, 4)
        worst.append(distance(flat.mean(0), flat.T.cov(), expected[step]))

    options = {"variance_type": variance_type, "temperature": temperature, "num_inference_steps": steps}
    sample(model, (BATCH, 4, POSITIONS), seeds=0, callback=compare, clip_sample=False, **options)
    assert len(worst) == steps
    assert max(mean for mean, _ in worst) < MEAN_TOLERANCE
    assert max(covariance for _, covariance in worst) < COVARIANCE_TOLERANCE


def test_the_closed_form_ends_near_the_data_and_shows_a_wrong_variance():
    model = PerPosition(MEAN, COVARIANCE, torch.from_numpy(SamplerConfig().alphas_cumprod()))
    mean, covariance = list(walk_of_moments(model, "fixed_small", 1.0, 1000))[-1]
    torch.testing.assert_close(mean, MEAN, atol=1e-4, rtol=0)
    # A thousand steps are not infinitely many: with beta_tilde the chain itself ends 1 % too narrow.
    torch.testing.assert_close(covariance, COVARIANCE, atol=0.01, rtol=0)
    small, large = (list(walk_of_moments(model, name, 1.0, 25)) for name in ("fixed_small", "fixed_large"))
    apart = max(distance(*wrong, right)[1] for wrong, right in zip(large, small, strict=True))
    assert apart > 3 * COVARIANCE_TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_ideal_denoiser_returns_its_data_in_equal_shares(prediction_type):
    data = torch.sign(torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    config = SamplerConfig(prediction_type=prediction_type)
    model = IdealDenoiser(data, config.alphas_cumprod(), prediction_type)
    x = sample(model, (300, 2, 4, 4), seeds=0, config=config)
    distance = (x[:, None] - data).flatten(2).abs().amax(2)
    nearest = distance.argmin(1)
    assert distance.gather(1, nearest[:, None]).max() < 1e-3
    assert stats.chisquare(nearest.bincount(minlength=5)).pvalue > 0.001


def test_the_share_test_sees_a_walk_that_is_not_exact():
    """Without the noise of the steps the walk favours some rows: the same test must notice."""
    data = torch.sign(torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    model = IdealDenoiser(data * torch.tensor([1.0, 1, 1, 1, 0.2]).view(5, 1, 1, 1), SamplerConfig().alphas_cumprod())
    shares = []
    for temperature in (1.0, 0.0):
        x = sample(model, (300, 2, 4, 4), seeds=0, temperature=temperature)
        nearest = (x[:, None] - model.data.float()).flatten(2).abs().amax(2).argmin(1)
        shares.append(stats.chisquare(nearest.bincount(minlength=5)).pvalue)
    assert shares[0] > 0.001
    assert shares[1] < 1e-6


def test_the_ideal_denoiser_draws_moons():
    model = IdealDenoiser(moons.batch(64, seed=3), SamplerConfig().alphas_cumprod())
    x = sample(model, (8, 1, 32, 32), seeds=0, num_inference_steps=200)
    _, misfit = moons.measure(x)
    assert misfit.max() < 0.01
