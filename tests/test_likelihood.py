"""Tests of the bound: against its definition, closed forms, and data of known information."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_fast.config import PREDICTION_TYPES, SamplerConfig
from ddpm_fast.edit import noised
from ddpm_fast.likelihood import HALF_BIN, bits_per_dimension, log_decoder, prior_bits, schedule_report
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.reference import Diffusion
from ddpm_fast.schedules import BETA_SCHEDULES
from ddpm_fast.table import build_table
from tests.support.networks import Gaussian, Wavy

QUIET = {"progress": False}


def images(count, seed=0, shape=(2, 3, 5)):
    """Return images of 256 values on [-1, 1]."""
    return torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed)) / 127.5 - 1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("clip", [True, False])
def test_against_the_definition(prediction_type, variance_type, clip):
    """Compare every term with torch.distributions on the textbook's distributions, at the same draws of x_t."""
    learned = variance_type.startswith("learned")
    model = Wavy(2, 4 if learned else 2)
    options = {"prediction_type": prediction_type, "variance_type": variance_type, "clip_sample": clip}
    config = SamplerConfig(num_train_timesteps=20, beta_end=0.4, **options)
    x_0 = images(3)
    bound = bits_per_dimension(model, x_0, config=config, seeds=5, batch_size=2, **QUIET)
    diffusion = Diffusion(torch.from_numpy(config.betas()))
    x_0 = x_0.double()
    for place, t in enumerate(range(19, -1, -1)):
        x_t = noised(x_0, t, config, 5)
        output = model(x_t, torch.full((3,), t)).double()
        x_hat = diffusion.predict_x_0(x_t.double(), t, output[:, :2], prediction_type)
        x_hat = x_hat.clamp(-1, 1) if clip else x_hat
        mean, _ = diffusion.q_posterior(x_hat, x_t.double(), t)
        at = 1 if t == 0 and variance_type == "fixed_small" else t
        variance = diffusion.p_variance(at, variance_type, output[:, 2:])
        if t == 0 and variance_type == "learned_range":  # beta_tilde of t = 0 is zero: t = 1 replaces it
            share = (output[:, 2:] + 1) / 2
            before = diffusion.p_variance(1, "fixed_small", output)
            variance = torch.exp(share * torch.log(diffusion.betas[0]) + (1 - share) * torch.log(before))
        model_step = Normal(mean, torch.as_tensor(variance).sqrt().expand(mean.shape))
        if t > 0:
            true_mean, true_variance = diffusion.q_posterior(x_0, x_t.double(), t)
            nats = kl_divergence(Normal(true_mean, true_variance.sqrt().expand(mean.shape)), model_step)
        else:
            above = torch.where(x_0 > 0.999, 1.0, model_step.cdf(x_0 + HALF_BIN))
            below = torch.where(x_0 < -0.999, 0.0, model_step.cdf(x_0 - HALF_BIN))
            nats = -(above - below).clamp(min=1e-12).log()
        expected = nats.flatten(1).mean(1) / math.log(2)
        np.testing.assert_allclose(bound.terms[:, place], expected.numpy(), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(bound.x0_mse[:, place], (x_0 - x_hat).square().flatten(1).mean(1), rtol=1e-4)
    end = Normal(diffusion.alphas_bar[-1].sqrt() * x_0, (1 - diffusion.alphas_bar[-1]).sqrt().expand(x_0.shape))
    prior = kl_divergence(end, Normal(torch.zeros_like(x_0), torch.ones_like(x_0))).flatten(1).mean(1) / math.log(2)
    np.testing.assert_allclose(bound.prior, prior, rtol=1e-6)
    np.testing.assert_allclose(bound.total, bound.prior + bound.terms.sum(1), rtol=1e-12)
    assert bound.timesteps.tolist() == list(range(19, -1, -1))


@pytest.mark.parametrize("count", [2, 16])
def test_the_information_of_a_finite_data_set(count):
    """Check that all steps of the best denoiser sum to log2 N bits for N equally probable images."""
    data = torch.sign(torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    model = IdealDenoiser(data, SamplerConfig().alphas_cumprod())
    bound = bits_per_dimension(model, data.repeat(64 // count * 4, 1, 1, 1), seeds=0, batch_size=256, **QUIET)
    bits = 16 * (bound.prior + bound.terms[:, :-1].sum(1)).mean()
    assert math.log2(count) - 0.15 < bits < 1.08 * math.log2(count) + 0.15
    worse = IdealDenoiser(data.roll(1, 3), SamplerConfig().alphas_cumprod())
    wrong = bits_per_dimension(worse, data, seeds=0, **QUIET)
    assert 16 * wrong.total.mean() > 10 * bits


def test_gaussian_data_have_closed_form_terms():
    """Check the KL terms against E |x_0 - E[x_0 | x_t]|^2, which is the posterior's variance."""
    variance = 0.09
    alpha_bars = SamplerConfig().alphas_cumprod()
    model = Gaussian(torch.zeros(1), variance * torch.eye(1), torch.from_numpy(alpha_bars))
    x_0 = 0.3 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    keep = x_0.abs().flatten() < 1
    config = SamplerConfig(num_inference_steps=20, clip_sample=False)
    bound = bits_per_dimension(PerSample(model), x_0[keep], config=config, seeds=0, batch_size=20_000, **QUIET)
    table = build_table(config)
    for place, t in enumerate(table.timestep[:-1]):
        alpha_bar = alpha_bars[t]
        left = 1 / (1 / variance + alpha_bar / (1 - alpha_bar))
        expected = 0.5 * table.c_x0[place] ** 2 * left / table.sigma[place] ** 2 / math.log(2)
        assert bound.terms[:, place].mean() == pytest.approx(expected, rel=0.06)


class PerSample(torch.nn.Module):
    """A `Gaussian` of one dimension, for a batch that is all at one timestep."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t[:1])


@pytest.mark.parametrize("t", [1, 2, 10, 500, 999])
def test_a_step_is_the_error_of_epsilon_of_x0_and_of_v(t):
    """Check KL - const = weight |error|^2 for each prediction, in 50 digits (Ho et al. 2020, eq. 8 to 12)."""
    betas = SamplerConfig().betas()
    with mpmath.workdps(50):
        alphas = [1 - mpmath.mpf(float(beta)) for beta in betas]
        alpha_bar, before = mpmath.fprod(alphas[: t + 1]), mpmath.fprod(alphas[:t])
        beta, alpha = 1 - alphas[t], alphas[t]
        x_0, x_hat, x_t = mpmath.mpf("0.3"), mpmath.mpf("-0.2"), mpmath.mpf("0.7")

        def mean(x0):  # mean of q(x_{t-1} | x_t, x_0) by Bayes' rule, weighted by precision
            precision = alpha / beta + 1 / (1 - before)
            return (mpmath.sqrt(alpha) / beta * x_t + mpmath.sqrt(before) / (1 - before) * x0) / precision

        variance = 1 / (alpha / beta + 1 / (1 - before))
        kl = (mean(x_0) - mean(x_hat)) ** 2 / (2 * variance)
        signal, deviation = mpmath.sqrt(alpha_bar), mpmath.sqrt(1 - alpha_bar)
        epsilon, epsilon_hat = ((x_t - signal * x0) / deviation for x0 in (x_0, x_hat))
        v, v_hat = (signal * e - deviation * o for e, o in ((epsilon, x_0), (epsilon_hat, x_hat)))
        of_epsilon = beta**2 / (2 * variance * alpha * (1 - alpha_bar)) * (epsilon - epsilon_hat) ** 2
        of_x0 = before * beta**2 / (2 * variance * (1 - alpha_bar) ** 2) * (x_0 - x_hat) ** 2
        of_v = before * beta**2 / (2 * variance * (1 - alpha_bar)) * (v - v_hat) ** 2
        for weighted in (of_epsilon, of_x0, of_v):
            assert abs(weighted / kl - 1) < mpmath.mpf(10) ** -40
        table = build_table(SamplerConfig())
        row = 999 - t
        assert float(mpmath.sqrt(variance)) == pytest.approx(table.sigma[row], rel=1e-9)
        assert float(mean(x_0)) == pytest.approx(float(table.c_x0[row] * 0.3 + table.c_x[row] * 0.7), rel=1e-9)


@pytest.mark.parametrize("deviation", [1e-3, 0.01, 0.3, 5.0])
def test_the_decoder_is_a_distribution_over_the_256_values(deviation):
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[None]
    for mean in (-1.0, 0.12345, 1.3):
        log_p = log_decoder(values, torch.full_like(values, mean), torch.full_like(values, 2 * math.log(deviation)))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.isfinite(log_p).all()


def test_the_decoder_is_exact_far_out_on_either_side():
    """Check a point where both distribution functions are 1 to sixteen digits."""
    x = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    mean = torch.zeros(1, 2, dtype=torch.float64)
    log_p = log_decoder(x, mean, torch.full_like(x, 2 * math.log(0.09)))
    with mpmath.workdps(40):
        exact = mpmath.log(mpmath.ncdf((0.5 + HALF_BIN) / 0.09) - mpmath.ncdf((0.5 - HALF_BIN) / 0.09))
    assert log_p[0, 0].item() == pytest.approx(float(exact), rel=1e-9)
    assert log_p[0, 1].item() == pytest.approx(float(exact), rel=1e-9)


def test_batches_seeds_and_conditions():
    x_0, shift = images(5), torch.randn(5, 1, 1, 1)
    options = {"num_inference_steps": 10, **QUIET}
    whole = bits_per_dimension(Wavy(2, 2), x_0, seeds=3, model_kwargs={"shift": shift}, **options)
    parts = bits_per_dimension(Wavy(2, 2), x_0, seeds=3, model_kwargs={"shift": shift}, batch_size=2, **options)
    np.testing.assert_allclose(whole.terms, parts.terms, rtol=1e-5)
    assert whole.seeds == [3, 4, 5, 6, 7]
    one = bits_per_dimension(Wavy(2, 2), x_0[3:4], seeds=6, model_kwargs={"shift": shift[3:4]}, **options)
    np.testing.assert_allclose(one.terms[0], whole.terms[3], rtol=1e-5)
    assert not np.allclose(bits_per_dimension(Wavy(2, 2), x_0, seeds=9, **options).terms, whole.terms)


def test_keywords_reach_the_network():
    def model(x, t, labels):
        seen.append(labels.tolist())
        return torch.zeros_like(x)

    seen = []
    labels = torch.arange(5)
    bits_per_dimension(model, images(5), num_inference_steps=2, batch_size=3, model_kwargs={"labels": labels}, **QUIET)
    assert seen == [[0, 1, 2]] * 2 + [[3, 4]] * 2


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_gets_near_noise(name):
    report = schedule_report(SamplerConfig(beta_schedule=name))
    assert report["signal"] < 0.1
    assert report["prior_bits"] < 0.01
    short = schedule_report(SamplerConfig(num_train_timesteps=50))
    assert short["signal"] > 0.5
    alpha_bar = short["signal"] ** 2
    exact = kl_divergence(Normal(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)), Normal(0.0, 1.0)) / math.log(2)
    assert short["prior_bits"] == pytest.approx(exact.item(), rel=1e-5)
    assert float(prior_bits(torch.ones(1, 2), 0.0)) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "ddim"}, ValueError, "the bound is DDPM's"),
        ({"thresholding": True}, ValueError, "without dynamic thresholding"),
        ({"temperature": 0.5}, ValueError, "at temperature 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"x_0": images(2) * 255}, ValueError, r"x_0 must lie on \[-1, 1\], got values from"),
        ({"x_0": images(2) / 0}, ValueError, "x_0 must be finite"),
        ({"x_0": "image"}, ValueError, "x_0 must be a float tensor"),
        ({"x_0": images(2)[:0]}, ValueError, "at least one image"),
        ({"num_inference_steps": 1}, ValueError, "has no beta_tilde"),
        ({"seeds": [1]}, ValueError, "seeds"),
        ({"step": 3}, TypeError, "step"),
    ],
)
def test_bad_input(options, error, message):
    def model(x, t):
        raise AssertionError("the network was called")

    with pytest.raises(error, match=message):
        bits_per_dimension(model, **{"x_0": images(2), "device": "cpu", **options})


def test_nan_names_its_timestep():
    def model(x, t):
        return torch.where(t.view(-1, 1, 1, 1) == 40, torch.nan, x)

    with pytest.raises(FloatingPointError, match="timestep 40"):
        bits_per_dimension(model, images(2), timesteps=[90, 40, 0], device="cpu", **QUIET)
