"""Tests of sampling that begins from images: closed forms, planted mistakes, and moons that are measured."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import moons
from ddpm_fast.edit import (
    _back_and_forth,
    denoise,
    from_level,
    inpaint,
    interpolate,
    invert,
    inverted,
    noised,
    resampled,
)
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.reference import Diffusion
from ddpm_fast.sample import sample
from ddpm_fast.table import build_table
from tests.support.networks import Gaussian, Wavy

CONFIG = SamplerConfig()
ALPHA_BARS = CONFIG.alphas_cumprod()
DATA = torch.sign(torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
QUIET = {"progress": False}


class Seen(nn.Module):
    """A network that keeps its first input."""

    def __init__(self):
        super().__init__()
        self.first = None

    def forward(self, x, t):
        if self.first is None:
            self.first = x.clone(), t.clone()
        return torch.zeros_like(x)


def start_of(function, *args, **options):
    model = Seen()
    function(model, *args, num_inference_steps=10, **QUIET, **options)
    return model.first


class TestPartialDenoising:
    def test_it_begins_at_the_level_of_noise(self):
        x_0 = torch.full((400, 2, 4, 4), 0.5)
        x, t = start_of(denoise, x_0, 350, seeds=0)
        assert t.unique().tolist() == [300]  # the largest timestep <= 350 of ten steps
        deviation = math.sqrt(1 - ALPHA_BARS[300])
        assert abs(x.mean() - 0.5 * math.sqrt(ALPHA_BARS[300])) < 5 * deviation / math.sqrt(x.numel())
        assert abs(x.std() / deviation - 1) < 5 / math.sqrt(2 * x.numel())

    def test_little_noise_gives_the_image_back_and_much_any(self):
        model = IdealDenoiser(DATA, ALPHA_BARS)
        x_0 = DATA[:1].expand(100, -1, -1, -1)
        near, far = (denoise(model, x_0, t, seeds=0, **QUIET) for t in (200, 999))
        assert (near - x_0).abs().max() < 1e-3
        rows = (far[:, None] - DATA).flatten(2).abs().amax(2).argmin(1)
        assert len(rows.unique()) == 5

    def test_the_noise_is_that_of_the_seed(self):
        x_0 = torch.rand(3, 2, 4, 4)
        whole = denoise(Wavy(2, 2), x_0, 500, seeds=[4, 5, 6], num_inference_steps=20, **QUIET)
        part = denoise(Wavy(2, 2), x_0[1:], 500, seeds=[5, 6], num_inference_steps=20, **QUIET)
        torch.testing.assert_close(whole[1:], part)
        assert not torch.equal(noised(x_0, 500, CONFIG, 1), noised(x_0, 500, CONFIG, 1, visit=1))

    def test_fresh_seeds_are_reported(self, caplog):
        with caplog.at_level(logging.INFO, "ddpm_fast"):
            denoise(Wavy(2, 2), torch.zeros(2, 2, 4, 4), 100, num_inference_steps=20, **QUIET)
        assert "drew seeds" in caplog.text

    def test_the_steps_that_are_left(self):
        config = SamplerConfig(num_inference_steps=50)
        left = from_level(config, 333)
        assert left.inference_timesteps().tolist() == [t for t in config.inference_timesteps() if t <= 333]
        whole, part = build_table(config), build_table(left)
        for column in ("a", "b", "c_x0", "c_x", "sigma", "noise_id"):
            np.testing.assert_array_equal(getattr(part, column), getattr(whole, column)[-len(part) :])


class TestInterpolation:
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("mixing", ["linear", "spherical"])
    @pytest.mark.parametrize("lam", [0.3, 0.5])
    def test_the_mixture_has_the_level_of_noise(self, mixing, shared, lam):
        x_a, x_b = torch.full((400, 2, 4, 4), 0.8), torch.full((400, 2, 4, 4), 0.8)
        x, _ = start_of(interpolate, x_a, x_b, 600, lam, mixing=mixing, shared_noise=shared, seeds=0)
        assert abs(x.std() / math.sqrt(1 - ALPHA_BARS[600]) - 1) < 5 / math.sqrt(2 * x.numel()) + 0.005
        if mixing == "linear":
            assert abs(x.mean() - 0.8 * math.sqrt(ALPHA_BARS[600])) < 5 / math.sqrt(x.numel())

    def test_without_rescaling_there_is_too_little(self):
        """Check the variance of denoising-diffusion-pytorch: two independent noises leave half of it in the middle."""
        zeros = torch.zeros(400, 2, 4, 4)
        x, _ = start_of(interpolate, zeros, zeros, 600, 0.5, rescale=False, seeds=0)
        assert abs(x.var() / (0.5 * (1 - ALPHA_BARS[600])) - 1) < 5 * math.sqrt(2 / x.numel())

    @pytest.mark.parametrize("mixing", ["linear", "spherical"])
    def test_its_ends_are_denoised_images(self, mixing):
        x_a, x_b = torch.rand(2, 3, 2, 4, 4)
        options = {"seeds": 3, "num_inference_steps": 20, **QUIET}
        first = interpolate(Wavy(2, 2), x_a, x_b, 500, 0.0, mixing=mixing, **options)
        torch.testing.assert_close(first, denoise(Wavy(2, 2), x_a, 500, **options), atol=1e-4, rtol=0)
        last = interpolate(Wavy(2, 2), x_a, x_b, 500, 1.0, mixing=mixing, shared_noise=True, **options)
        torch.testing.assert_close(last, denoise(Wavy(2, 2), x_b, 500, **options), atol=1e-4, rtol=0)

    def test_spherical_weights_are_those_of_the_great_circle(self):
        """Check that both weights are 1 / sqrt(2) half way between orthogonal points of equal length."""
        a, b = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
        a[0, 0, 0] = b[0, 1, 1] = 3.0
        from ddpm_fast.edit import _weights

        for lam in (0.0, 0.25, 0.5, 1.0):
            w_a, w_b = _weights(a, b, lam, "spherical")
            assert w_a.item() == pytest.approx(math.cos(lam * math.pi / 2), abs=1e-6)
            assert w_b.item() == pytest.approx(math.sin(lam * math.pi / 2), abs=1e-6)
        w_a, w_b = _weights(a, a, 0.3, "spherical")
        assert (w_a.item(), w_b.item()) == pytest.approx((0.7, 0.3), abs=1e-4)


def moon(lit, count):
    moon = moons.Moons(*(torch.tensor([value]) for value in (lit, 1.0, 16.0, 16.0, 8.0)))
    return moons.render(moon).expand(count, -1, -1, -1)


def is_fusion(images):
    """Judge whether images lie between a full and a half moon.

    Fusions are lit to three quarters on average ("mean"), as sharp as moons ("sharp"), and mostly near three quarters
    each ("between").
    """
    fitted, misfit = moons.measure(images)
    between = ((fitted.lit > 0.6) & (fitted.lit < 0.9)).double().mean()
    return {
        "mean": abs(fitted.lit.mean().item() - 0.75) < 0.06,
        "sharp": misfit.median().item() < 0.05,
        "between": between.item() > 0.25,
    }


class TestMoons:
    """The tutorial's example: full moon and half moon meet at three quarters, on average over many draws."""

    def test_full_and_half_make_three_quarters(self):
        checkpoint = load_checkpoint()
        fused = interpolate(
            checkpoint.model, moon(1.0, 64), moon(0.5, 64), 300, 0.5, seeds=0, config=checkpoint.diffusion,
            num_inference_steps=100, optimize="hoist", memory_format="channels_last", **QUIET,
        )  # fmt: skip
        assert is_fusion(fused) == {"mean": True, "sharp": True, "between": True}

    def test_an_average_of_pixels_is_none(self):
        assert is_fusion((moon(1.0, 64) + moon(0.5, 64)) / 2) == {"mean": True, "sharp": False, "between": True}

    def test_one_of_the_two_at_random_is_none(self):
        images = torch.cat([moon(1.0, 32), moon(0.5, 32)])
        assert is_fusion(images) == {"mean": True, "sharp": True, "between": False}


class TestInpainting:
    def test_what_is_known_is_kept_and_the_rest_fits_to_it(self):
        model = IdealDenoiser(DATA, ALPHA_BARS)
        known, mask = DATA[[0, 1, 2, 3]].clone(), torch.zeros(1, 1, 4, 4)
        mask[..., :2, :] = 1
        known[..., 2:, :] = 0.3  # has no effect
        x = inpaint(model, known, mask, seeds=0, num_inference_steps=100, resamplings=3, **QUIET)
        assert torch.equal(x[..., :2, :], known[..., :2, :])
        assert (x - DATA[[0, 1, 2, 3]]).abs().max() < 1e-3

    def test_going_back_makes_the_rest_depend_on_what_is_known(self):
        """Compare Gaussian pairs of correlation 0.9 with the closed form of the second given the first.

        A plain run without resampling falls short of it.
        """
        covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
        model = PerPosition(torch.zeros(2, dtype=torch.float64), covariance)
        known = torch.zeros(40, 2, 50)
        known[:, 0] = 1.0
        mask = torch.tensor([1.0, 0.0]).view(1, 2, 1)
        means = []
        for resamplings in (1, 10):
            options = {"num_inference_steps": 50, "clip_sample": False, "seeds": 0, **QUIET}
            x = inpaint(model, known, mask, resamplings=resamplings, jump_length=5, **options)
            assert torch.equal(x[:, 0], known[:, 0])
            means.append(x[:, 1].mean().item())
        plain, back = means  # E[x_2 | x_1 = 1] = 0.9; standard error 0.01
        assert abs(back - 0.9) < 0.08
        assert plain < back - 0.1

    @pytest.mark.parametrize("options", [{"sampler": "ddim", "eta": 0.0}, {"variance_type": "fixed_large"}], ids=str)
    def test_other_samplers(self, options):
        x = inpaint(Wavy(2, 2), torch.ones(2, 2, 3, 5), torch.eye(5)[:3] > 0, resamplings=2, jump_length=3,
                    num_inference_steps=12, seeds=0, **options, **QUIET)  # fmt: skip
        assert torch.equal(x[..., 0, 0], torch.ones(2, 2))
        assert torch.isfinite(x).all()

    def test_both_backends_draw_the_same(self, kernel_device):
        known = torch.rand(2, 2, 3, 5)
        mask = (torch.rand(2, 2, 3, 5) < 0.5).float()
        options = {"num_inference_steps": 6, "resamplings": 2, "jump_length": 2, "seeds": 0, **QUIET}
        model = Wavy(2, 2)
        on_torch = inpaint(model, known, mask, backend="torch", **options)
        on_triton = inpaint(model.to(kernel_device), known, mask, backend="triton", **options)
        torch.testing.assert_close(on_triton.cpu(), on_torch, atol=1e-3, rtol=0)

    def test_a_soft_mask_blends(self):
        known = torch.ones(2, 2, 4, 4)
        x = inpaint(Wavy(2, 2), known, torch.full((1,), 0.5), seeds=0, num_inference_steps=5, **QUIET)
        free = sample(Wavy(2, 2), known.shape, seeds=0, num_inference_steps=5, **QUIET)
        assert not torch.allclose(x, free)
        assert not torch.allclose(x, known)


class PerPosition(Gaussian):
    """A `Gaussian` over the channels of [B, 2, positions]."""

    def __init__(self, mean, covariance):
        super().__init__(mean, covariance, torch.from_numpy(ALPHA_BARS))

    def forward(self, x, t):
        flat = x.transpose(1, 2).reshape(-1, x.shape[1])
        return super().forward(flat, t[:1]).view(len(x), -1, x.shape[1]).transpose(1, 2)


def published_schedule(steps, jump_length, jump_n_sample):
    """Return the times of RePaint's appendix, written from its text.

    t falls, and goes back at every jump_length-th time.
    """
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                times.append(t)
    return times


class TestResampledTable:
    @pytest.mark.parametrize(("steps", "jump", "times"), [(250, 10, 10), (20, 5, 2), (12, 1, 3), (10, 9, 4)])
    def test_the_schedule_is_the_papers(self, steps, jump, times):
        rows, jumps = _back_and_forth(steps, times, jump)
        levels = [steps]  # the number of steps left; the paper's t = 0, the last noisy state, is level 1
        for row, back in zip(rows, jumps, strict=True):
            levels.append(steps - 1 - row)
            levels += range(steps - row, steps - row + back)
        assert [t + 1 for t in published_schedule(steps, jump, times)] == levels[:-1]
        assert levels[-1] == 0

    @pytest.mark.parametrize("options", [{}, {"sampler": "ddim", "eta": 0.5}, {"temperature": 0.7}], ids=str)
    def test_a_row_that_jumps_is_a_step_and_the_way_back_to_noise(self, options):
        config = SamplerConfig(num_inference_steps=20, **options)
        plain, table = build_table(config), resampled(config, 3, 4)
        rows, jumps = _back_and_forth(20, 3, 4)
        assert len(table) == len(rows)
        for place in (np.flatnonzero(jumps)[0], np.flatnonzero(jumps)[-1], np.flatnonzero(jumps == 0)[3], -1):
            row, jump = rows[place], jumps[place]
            betas = [
                1 - ALPHA_BARS[plain.timestep[r]] / ALPHA_BARS[plain.timestep[r + 1]]
                for r in range(row, row - jump, -1)
            ]
            scale, variance, known = 1.0, plain.sigma[row] ** 2, plain.known_scale[row]
            for beta in betas:  # one forward step at a time (Ho et al. 2020, eq. 2)
                scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
                known *= math.sqrt(1 - beta)
            for column in ("c_x0", "c_x", "c_out"):
                assert getattr(table, column)[place] == pytest.approx(scale * getattr(plain, column)[row], abs=1e-12)
            assert table.sigma[place] == pytest.approx(math.sqrt(variance), abs=1e-12)
            assert table.known_scale[place] == pytest.approx(known, abs=1e-12)
            assert table.known_sigma[place] == pytest.approx(math.sqrt(1 - known**2), abs=1e-9)
        np.testing.assert_array_equal(table.timestep, plain.timestep[rows])

    def test_no_two_steps_share_their_noise(self):
        table = resampled(SamplerConfig(num_inference_steps=50), 5, 5)
        assert len(set(table.noise_id.tolist())) == len(table)
        assert table.noise_id.max() < 2**31
        plain = build_table(SamplerConfig(num_inference_steps=50))
        assert set(plain.noise_id.tolist()) <= set(table.noise_id.tolist())

    def test_one_resampling_is_a_plain_table(self):
        config = SamplerConfig(num_inference_steps=50)
        np.testing.assert_array_equal(resampled(config, 1, 10).coefficients(), build_table(config).coefficients())


class TestInversion:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_ddim_returns_to_the_image(self, prediction_type):
        covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
        epsilon = PerPosition(torch.tensor([0.2, -0.3], dtype=torch.float64), covariance)

        def velocity(x, t):
            alpha_bar = torch.from_numpy(ALPHA_BARS)[t].view(-1, 1, 1)
            noise = epsilon(x, t).double()
            x0 = (x.double() - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
            return (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0).to(x.dtype)

        model = epsilon if prediction_type == "epsilon" else velocity
        x_0 = torch.randn(4, 2, 30, generator=torch.Generator().manual_seed(1)) * 0.6
        errors = []
        for steps in (50, 200, 1000):
            options = {"num_inference_steps": steps, "prediction_type": prediction_type, "device": "cpu", **QUIET}
            x_T = invert(model, x_0, **options)
            back = sample(model, x_0.shape, x_T=x_T, sampler="ddim", clip_sample=False, **options)
            errors.append((back - x_0).abs().max().item())
        assert errors[2] < 0.02
        assert errors[2] < errors[1] / 3 < errors[0] / 9  # convergence of first order

    def test_the_noise_is_noise(self):
        """Check that the inversion of Gaussian data is N(0, I)."""
        covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
        model = PerPosition(torch.tensor([1.0, 0.0], dtype=torch.float64), covariance)
        draws = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x_0 = (draws @ torch.linalg.cholesky(covariance).T + model.mean).float().view(40, 100, 2).transpose(1, 2)
        x_T = invert(model, x_0.contiguous(), num_inference_steps=200, **QUIET)
        flat = x_T.transpose(1, 2).reshape(-1, 2).double()
        assert flat.mean(0).abs().max() < 0.08
        torch.testing.assert_close(flat.T.cov(), torch.eye(2, dtype=torch.float64), atol=0.12, rtol=0)

    def test_its_rows_undo_the_steps_of_ddim(self):
        """Check that both steps cancel exactly if the network's epsilon is the same on both sides."""
        config = SamplerConfig(num_inference_steps=10, sampler="ddim", clip_sample=False)
        down, up = build_table(config), inverted(config)
        x, epsilon = np.array([0.7, -0.2]), np.array([0.5, 1.1])
        for place in range(len(up)):
            noisier = up.c_x0[place] * (up.a[place] * x + up.b[place] * epsilon) + up.c_x[place] * x
            noisier = noisier + up.c_out[place] * epsilon
            row = len(down) - 1 - place
            assert down.timestep[row] == up.timestep[place]
            back = down.c_x0[row] * (down.a[row] * noisier + down.b[row] * epsilon) + down.c_x[row] * noisier
            np.testing.assert_allclose(back + down.c_out[row] * epsilon, x, atol=1e-12)
            x = noisier


TRAILING = {"timestep_spacing": "trailing", "num_inference_steps": 7}
X = torch.zeros(2, 2, 4, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, **options: denoise(m, X, 500, **options),
        lambda m, **options: interpolate(m, X, X, 500, **options),
        lambda m, **options: inpaint(m, X, X, **options),
        lambda m, **options: invert(m, X, **options),
    ],
    ids=["denoise", "interpolate", "inpaint", "invert"],
)
def test_options_reach_the_sampler(call):
    def model(x, t, labels):
        seen.append((x.dtype, labels.tolist()))
        return torch.zeros_like(x)

    seen = []
    call(model, num_inference_steps=2, dtype=torch.bfloat16, model_kwargs={"labels": torch.tensor([3, 5])}, **QUIET)
    assert set(map(str, seen)) == {"(torch.bfloat16, [3, 5])"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: denoise(m, X, 1000), r"t must be an integer in \[0, 999\], got 1000"),
        (lambda m: denoise(m, X[0, 0, 0], 10), r"x_0 must be a float tensor of shape \(batch, channels, \.\.\.\)"),
        (lambda m: denoise(m, X.long(), 10), "x_0 must be a float tensor"),
        (lambda m: denoise(m, X / 0, 10), "x_0 must be finite"),
        (lambda m: denoise(m, "image", 10), "x_0 must be a float tensor .* got str"),
        (lambda m: denoise(m, X, 5, timesteps=[900, 100]), "at least the last timestep of the run, 100, got 5"),
        (lambda m: denoise(m, X, 500, previous_timestep="stride", **TRAILING), "take 'spacing'"),
        (lambda m: interpolate(m, X, X[:1], 10), "x_a and x_b must have one shape"),
        (lambda m: interpolate(m, X, X, 10, 1.5), r"lam must be a finite number in \[0, 1\]"),
        (lambda m: interpolate(m, X, X, 10, mixing="cubic"), "mixing must be one of"),
        (lambda m: inpaint(m, X, torch.ones(3, 3)), r"mask must broadcast to \(2, 2, 4, 4\), got \(3, 3\)"),
        (lambda m: inpaint(m, X, torch.full((1,), 2.0)), "mask must lie in"),
        (lambda m: inpaint(m, X, torch.ones(4, 4).long()), "mask must be a float or bool tensor"),
        (lambda m: inpaint(m, X, X, resamplings=0), "resamplings must be an integer >= 1"),
        (lambda m: inpaint(m, X, X, resamplings=2, variance_type="learned_range"), "variance_type='learned_range'"),
        (lambda m: inpaint(m, X, X, generator=torch.Generator()), "generator"),
        (lambda m: invert(m, X, prediction_type="sample"), "not prediction_type='sample'"),
        (lambda m: sample(m, X.shape, known=X), "known and mask belong together"),
        (lambda m: sample(m, X.shape, known=X, mask=X, generator=torch.Generator()), "not with a generator"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_network_runs(call, message):
    def model(x, t):
        raise AssertionError("the network was called")

    with pytest.raises((ValueError, TypeError), match=message):
        call(model)


def test_noised_is_the_reference():
    """Compare noised() with the textbook, given the same noise."""
    x_0 = torch.rand(3, 2, 4, 4)
    x_t = noised(x_0, 321, CONFIG, seeds=7)
    reference = Diffusion(torch.from_numpy(CONFIG.betas()))
    z = (x_t.double() - math.sqrt(ALPHA_BARS[321]) * x_0.double()) / math.sqrt(1 - ALPHA_BARS[321])
    torch.testing.assert_close(reference.q_sample(x_0.double(), 321, z), x_t.double(), atol=1e-6, rtol=0)
    assert abs(z.std() - 1) < 0.3
