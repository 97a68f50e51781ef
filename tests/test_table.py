"""Tests of the step table: diffusers' numbers, the reference sampler, Bayes' rule and the law of a run."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.config import PREDICTION_TYPES, VARIANCE_TYPES, SamplerConfig
from ddpm_fast.kernels.step import COLUMNS, step_torch
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.reference import Diffusion
from ddpm_fast.schedules import BETA_SCHEDULES
from ddpm_fast.table import build_table
from ddpm_fast.timesteps import TIMESTEP_SPACINGS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diffusers.json").read_text())
SPACINGS = tuple(TIMESTEP_SPACINGS)
DIRECTIONS = ("x0", "output")
SHAPE = (2, 3, 5)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def take_step(config, row, x, output, noise):
    """Execute row `row` of the table in float64, with the kernel's twin."""
    table = build_table(config)
    coefficients = table.coefficients(dtype=torch.float64)
    base = torch.full((len(x),), row, dtype=torch.int32)
    limit = {"clip": config.clip_sample_range if config.clip_sample else None}
    if config.thresholding:
        ratio, max_value = config.dynamic_thresholding_ratio, config.sample_max_value
        limit = {"bound": threshold_bound(x, output, coefficients, base, ratio=ratio, max_value=max_value)}
    x_new = torch.empty_like(x)
    return step_torch(x, output, coefficients, table.ids(), base, z=noise, learned=table.learned, x_new=x_new, **limit)


# diffusers' numbers


def golden_tensor(name):
    return torch.tensor(GOLDEN[name], dtype=torch.float64).view(GOLDEN["shape"])


def golden_name(case):
    options, _ = case
    words = []
    for key, value in options.items():
        if key in ("prediction_type", "variance_type", "timestep_spacing", "ddim_direction"):
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(key if value else f"no_{key}")
        else:
            words.append(f"{key}{value}")
    return "-".join(word for word in words if word not in ("clip_sample", "set_alpha_to_one"))


def check_golden(config, results):
    x, output, v, noise = (golden_tensor(name) for name in ("x", "output", "v", "noise"))
    if config.variance_type == "learned_range":
        output = torch.cat([output, v], dim=1)
    for row, expected in zip(GOLDEN["rows"], results, strict=True):
        actual = take_step(config, row, x, output, noise).flatten().numpy()
        # Both sides are float64, and the file keeps 13 digits. Where alpha_bar_s = 1 and t > 0, diffusers adds noise of
        # variance 1e-20 and the table none: 1e-10 z. Near t = 0, 1 - alpha_bar loses four digits.
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=5e-10, err_msg=f"row {row}")


@pytest.mark.parametrize("case", GOLDEN["ddpm"], ids=golden_name)
def test_ddpm_step_as_in_diffusers(case):
    options, results = case
    check_golden(SamplerConfig(num_inference_steps=GOLDEN["walk"], noise_free="t_zero", **options), results)


@pytest.mark.parametrize("case", GOLDEN["ddim"], ids=golden_name)
def test_ddim_step_as_in_diffusers(case):
    options, results = case
    config = SamplerConfig(
        sampler="ddim",
        num_inference_steps=GOLDEN["walk"],
        previous_timestep="stride",
        noise_free="t_zero",
        **options,
    )
    check_golden(config, results)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_float32_step_as_in_diffusers(prediction):
    x, output, noise = (golden_tensor(name) for name in ("x", "output", "noise"))
    config = SamplerConfig(prediction_type=prediction)
    for t, expected in GOLDEN["float32_steps"][prediction].items():
        actual = take_step(config, 999 - int(t), x, output, noise).flatten().numpy()
        # Its alpha_bar is float32: 1 - alpha_bar_1 = 2e-4 is known to 6e-8, a part in 4e-4, as are the coefficients.
        np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=f"t = {t}")


# The reference sampler


def chain_of(config):
    betas = torch.from_numpy(config.betas())
    return Diffusion(betas).respaced(config.inference_timesteps().tolist())


# Coefficients near t = 0 divide by 1 - alpha_bar = 1e-4, which cancels to a relative 1e-12 in either program.
# Unclipped x0 predictions reach 700 at t = 999.
CLOSE = {"rtol": 2e-12, "atol": 2e-12}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddpm_is_the_reference(prediction, variance, spacing):
    steps = 7
    for clip, temperature in ((1.0, 1.0), (None, 0.7), (2.5, 0.0)):
        config = SamplerConfig(
            num_inference_steps=steps,
            prediction_type=prediction,
            variance_type=variance,
            timestep_spacing=spacing,
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            temperature=temperature,
        )
        x, out, noise, v = (randn(seed, *SHAPE) for seed in range(4))
        output = torch.cat([out, v.tanh()], dim=1) if variance.startswith("learned") else out
        chain = chain_of(config)
        for row in range(steps):
            timesteps = []

            def model(x, t, timesteps=timesteps, output=output):
                timesteps.append(t.tolist())
                return output

            expected = chain.p_sample(model, x, steps - 1 - row, noise, prediction, variance, clip, temperature)
            torch.testing.assert_close(take_step(config, row, x, output, noise), expected, **CLOSE)
            assert timesteps == [[build_table(config).timestep[row]] * len(x)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddim_is_the_reference(prediction, direction, eta, spacing):
    steps = 7
    for clip in (1.0, None):
        config = SamplerConfig(
            sampler="ddim",
            num_inference_steps=steps,
            prediction_type=prediction,
            timestep_spacing=spacing,
            eta=eta,
            ddim_direction=direction,
            clip_sample=clip is not None,
        )
        outputs, noises = randn(1, steps, *SHAPE), randn(2, steps, *SHAPE)
        x = randn(3, *SHAPE)
        calls = iter(outputs)
        states = chain_of(config).ddim_sample(
            lambda x, t, calls=calls: next(calls), x, noises, eta, prediction, clip, direction
        )
        for row, expected in enumerate(states):
            actual = take_step(config, row, x, outputs[row], noises[row])
            # The reference takes epsilon from x_t - sqrt(alpha_bar) x0, divided by sqrt(1 - alpha_bar) = 1e-2 at
            # t = 0: rounding of x_t, 1e-16 of up to 1000 without clipping, a hundredfold.
            scale = max(1.0, x.abs().max().item())
            torch.testing.assert_close(actual, expected, rtol=2e-12, atol=2e-12 * scale)
            x = expected


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_is_the_reference(name):
    config = SamplerConfig(beta_schedule=name, num_train_timesteps=40)
    x, out, noise = (randn(seed, *SHAPE) for seed in range(3))
    chain = chain_of(config)
    for row in range(40):
        expected = chain.p_sample(lambda x, t: out, x, 39 - row, noise)
        # the sigmoid of alpha_bar starts at 1 - alpha_bar = 8e-3, the others at 1e-4 and more
        torch.testing.assert_close(take_step(config, row, x, out, noise), expected, rtol=5e-12, atol=5e-12)


# Bayes' rule and the law of a run


def alphas_between(config, steps):
    """Return (alpha_bar_t, alpha_bar_s, alpha) of every row, each a product over the betas and not a quotient."""
    alphas = 1 - config.betas()
    t = config.inference_timesteps()
    s = np.append(t[1:], -1)
    return (
        np.array([math.prod(alphas[: i + 1]) for i in t]),
        np.array([math.prod(alphas[: i + 1]) for i in s]),
        np.array([math.prod(alphas[j + 1 : i + 1]) for i, j in zip(t, s, strict=True)]),
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_posterior_is_bayes_rule(steps, spacing):
    config = SamplerConfig(num_inference_steps=steps, timestep_spacing=spacing)
    table = build_table(config)
    _, alpha_bar_s, alpha = alphas_between(config, steps)
    prior, likelihood = 1 - alpha_bar_s[:-1], 1 - alpha[:-1]  # variances of x_s | x_0 and of x_t | x_s
    variance = 1 / (1 / prior + alpha[:-1] / likelihood)
    # 1 - alpha is at least 1e-4 and cancels to 1e-12.
    np.testing.assert_allclose(table.sigma[:-1] ** 2, variance, rtol=1e-11)
    np.testing.assert_allclose(table.c_x0[:-1], variance * np.sqrt(alpha_bar_s[:-1]) / prior, rtol=1e-11)
    np.testing.assert_allclose(table.c_x[:-1], variance * np.sqrt(alpha[:-1]) / likelihood, rtol=1e-11)
    # The last prior is a point: x_0 itself.
    assert (table.c_x0[-1], table.c_x[-1], table.c_out[-1], table.sigma[-1]) == (pytest.approx(1, abs=1e-15), 0, 0, 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_large_variance_is_the_respaced_beta(steps, spacing):
    config = SamplerConfig(num_inference_steps=steps, timestep_spacing=spacing, variance_type="fixed_large")
    table = build_table(config)
    _, _, alpha = alphas_between(config, steps)
    np.testing.assert_allclose(table.sigma[:-1] ** 2, 1 - alpha[:-1], rtol=1e-11)  # cancellation, as above
    assert table.sigma[-1] == 0


configs = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(tuple(BETA_SCHEDULES)),
        "num_train_timesteps": st.integers(3, 300),
        "num_inference_steps": st.integers(1, 300),
        "timestep_spacing": st.sampled_from(SPACINGS),
        "prediction_type": st.sampled_from(PREDICTION_TYPES),
        "rescale_betas_zero_snr": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "previous_timestep": st.sampled_from(("spacing", "stride")),
    }
).map(
    lambda options: {
        **options,
        "num_inference_steps": min(options["num_inference_steps"], options["num_train_timesteps"]),
        "rescale_betas_zero_snr": options["rescale_betas_zero_snr"] and options["prediction_type"] != "epsilon",
    }
)
samplers = st.sampled_from([("ddpm", 0.0, "x0"), *itertools.product(["ddim"], [0.0, 0.5, 1.0], DIRECTIONS)])


@given(options=configs, sampler=samplers)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_the_step_keeps_the_marginals(options, sampler):
    """Check that x_t ~ q(x_t | x_0) becomes x_s ~ q(x_s | x_0) with a perfect network, in any sampler."""
    name, eta, direction = sampler
    config = SamplerConfig(sampler=name, eta=eta, ddim_direction=direction, noise_free="t_zero", **options)
    table, alpha_bars, t = build_table(config), config.alphas_cumprod(), config.inference_timesteps()
    signal, deviation = np.sqrt(alpha_bars[t]), np.sqrt(1 - alpha_bars[t])
    s = t - config.num_train_timesteps // len(t) if config.previous_timestep == "stride" else np.append(t[1:], -1)
    alpha_bar_s = np.where(s >= 0, alpha_bars[s], 1.0 if config.set_alpha_to_one else alpha_bars[0])
    # x_t = signal x_0 + deviation eps, and the output, as coefficients of (x_0, eps)
    out = {
        "epsilon": (np.zeros(len(t)), np.ones(len(t))),
        "sample": (np.ones(len(t)), np.zeros(len(t))),
        "v_prediction": (-deviation, signal),
    }[config.prediction_type]
    of_x_0 = table.c_x0 + table.c_x * signal + table.c_out * out[0]
    of_eps = table.c_x * deviation + table.c_out * out[1]
    # Sums of two terms of order 1, with coefficients whose 1 - alpha_bar >= 1e-4 cancels to 1e-12
    np.testing.assert_allclose(of_x_0, np.sqrt(alpha_bar_s), rtol=1e-11, atol=1e-13)
    variance = of_eps**2 + table.sigma**2
    noisy = s >= 0 if name == "ddpm" else slice(None)  # DDPM adds no noise at t = 0
    np.testing.assert_allclose(variance[noisy], (1 - alpha_bar_s)[noisy], rtol=1e-11, atol=1e-13)
    # (a, b) recover x_0 from x_t and the output.
    np.testing.assert_allclose(table.a * signal + table.b * out[0], 1, rtol=1e-9)
    np.testing.assert_allclose(table.a * deviation + table.b * out[1], 0, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_ddim_with_eta_one_is_ddpm(prediction, spacing, steps):
    options = {"prediction_type": prediction, "timestep_spacing": spacing, "num_inference_steps": steps}
    ddpm = build_table(SamplerConfig(**options))
    ddim = build_table(SamplerConfig(sampler="ddim", eta=1.0, ddim_direction="x0", **options))
    for name in ("timestep", "noise_id", *COLUMNS):
        # 1 - alpha_bar_s - sigma^2 cancels near t = 0: 1e-4 of 1
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_directions_agree_without_clipping(prediction):
    x, out, noise = (randn(seed, *SHAPE) for seed in range(3))
    results = [
        take_step(
            SamplerConfig(
                sampler="ddim", eta=0.5, num_inference_steps=10, prediction_type=prediction,
                ddim_direction=direction, clip_sample=clip,
            ), 4, x, 3 * out, noise,
        )
        for direction, clip in itertools.product(DIRECTIONS, (False, True))
    ]  # fmt: skip
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[1], results[3])


# Variances


def test_log_names_are_the_same_law():
    for kind in ("fixed_small", "fixed_large"):
        plain = build_table(SamplerConfig(variance_type=kind))
        log = build_table(SamplerConfig(variance_type=f"{kind}_log"))
        assert np.array_equal(plain.sigma, log.sigma)
        assert not any((plain.learned, plain.doubled, log.learned, log.doubled))


@pytest.mark.parametrize("row", [0, 12, 28])
def test_learned_is_the_log_variance(row):
    config = SamplerConfig(num_inference_steps=30, variance_type="learned", temperature=0.5)
    x, out, noise, v = (randn(seed, *SHAPE) for seed in range(4))
    v = 3 * v  # no interpolation between bounds: any real number
    noisy = take_step(config, row, x, torch.cat([out, v], dim=1), noise)
    mean = take_step(config, row, x, torch.cat([out, v], dim=1), None)
    torch.testing.assert_close(noisy - mean, 0.5 * (v / 2).exp() * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", [0, 12, 28])
def test_learned_range_lies_between_small_and_large(row):
    x, out, noise = (randn(seed, *SHAPE) for seed in range(3))
    ones = torch.ones_like(x)

    def learned(v):
        config = SamplerConfig(num_inference_steps=30, variance_type="learned_range")
        return take_step(config, row, x, torch.cat([out, v * ones], dim=1), noise)

    def fixed(kind):
        return take_step(SamplerConfig(num_inference_steps=30, variance_type=kind), row, x, out, noise)

    torch.testing.assert_close(learned(-1), fixed("fixed_small"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned(1), fixed("fixed_large"), rtol=1e-12, atol=1e-12)
    mean = take_step(SamplerConfig(num_inference_steps=30), row, x, out, None)
    halfway = ((fixed("fixed_small") - mean) * (fixed("fixed_large") - mean)).sqrt() * noise.sign()
    torch.testing.assert_close(learned(0) - mean, halfway, rtol=1e-9, atol=1e-12)  # differences of numbers near 1


def test_learned_range_bounds():
    table = build_table(SamplerConfig(variance_type="learned_range"))
    small = build_table(SamplerConfig()).sigma
    large = build_table(SamplerConfig(variance_type="fixed_large")).sigma
    assert table.learned
    assert table.doubled
    assert table.sigma.tolist() == [1] * 999 + [0]
    np.testing.assert_allclose(table.log_min[:-1], 2 * np.log(small[:-1]), rtol=1e-14)
    np.testing.assert_allclose(table.log_max[:-1], 2 * np.log(large[:-1]), rtol=1e-14)
    assert table.log_min[-1] == pytest.approx(math.log(1e-20))  # beta_tilde is 0 in the last row
    assert table.log_max[-1] == pytest.approx(math.log(1e-4))


def test_ddim_discards_the_learned_half():
    for variance in ("learned", "learned_range"):
        table = build_table(SamplerConfig(sampler="ddim", eta=0.5, variance_type=variance))
        plain = build_table(SamplerConfig(sampler="ddim", eta=0.5))
        assert (table.doubled, table.learned) == (True, False)
        assert np.array_equal(table.sigma, plain.sigma)


# Conventions


@pytest.mark.parametrize("sampler", [{}, {"variance_type": "learned_range"}, {"sampler": "ddim", "eta": 0.7}])
def test_temperature_scales_sigma_alone(sampler):
    base = build_table(SamplerConfig(num_inference_steps=30, **sampler))
    for temperature in (0.0, 0.25, 1.5):
        table = build_table(SamplerConfig(num_inference_steps=30, temperature=temperature, **sampler))
        np.testing.assert_allclose(table.sigma, temperature * base.sigma, rtol=1e-15)  # one rounding
        for name in set(COLUMNS) - {"sigma"}:
            assert np.array_equal(getattr(table, name), getattr(base, name)), name


@pytest.mark.parametrize(
    ("spacing", "noise_free", "quiet"),
    [
        ("leading", "last_step", True),
        ("leading", "t_zero", True),
        ("trailing", "last_step", True),
        ("trailing", "t_zero", False),
        ("linspace", "last_step", True),
        ("linspace", "t_zero", True),
    ],
)
@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
def test_where_ddpm_is_quiet(variance, spacing, noise_free, quiet):
    config = SamplerConfig(
        num_inference_steps=30, variance_type=variance, timestep_spacing=spacing, noise_free=noise_free
    )
    sigma = build_table(config).sigma
    assert (sigma[:-1] > 0).all()
    assert (sigma[-1] == 0) == quiet


def test_small_variance_ends_quietly_anyway():
    for spacing in SPACINGS:
        assert build_table(SamplerConfig(num_inference_steps=30, timestep_spacing=spacing)).sigma[-1] == 0
        config = SamplerConfig(num_inference_steps=30, timestep_spacing=spacing, noise_free="t_zero")
        assert build_table(config).sigma[-1] == 0


def test_ddim_is_quiet_in_the_last_step():
    options = {"sampler": "ddim", "eta": 1.0, "timesteps": [900, 40], "set_alpha_to_one": False}
    assert build_table(SamplerConfig(**options)).sigma[-1] == 0
    # diffusers' DDIM draws at every step
    assert build_table(SamplerConfig(**options, noise_free="t_zero")).sigma[-1] > 0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_ending_at_alpha_bar_0(sampler):
    options = {"sampler": sampler, "num_inference_steps": 30, "timestep_spacing": "trailing", "noise_free": "t_zero"}
    one = build_table(SamplerConfig(**options))
    zero = build_table(SamplerConfig(**options, set_alpha_to_one=False))
    for name in ("a", "b", "c_x0", "c_x", "c_out", "sigma"):
        assert np.array_equal(getattr(one, name)[:-1], getattr(zero, name)[:-1]), name
    # The last step ends where a step to timestep 0 ends.
    to_zero = build_table(SamplerConfig(**(options | {"num_inference_steps": None, "timesteps": [32, 0]})))
    for name in ("a", "b", "c_x0", "c_x", "c_out", "sigma"):
        np.testing.assert_allclose(getattr(zero, name)[-1], getattr(to_zero, name)[0], rtol=1e-14, err_msg=name)


def test_ending_at_alpha_bar_0_from_timestep_0_stays():
    table = build_table(SamplerConfig(num_inference_steps=10, set_alpha_to_one=False))
    assert (table.c_x0[-1], table.c_x[-1], table.sigma[-1]) == (0, 1, 0)


def test_stride_and_spacing_differ_where_they_should():
    def c_x0(spacing, previous):
        options = {"num_inference_steps": 30, "timestep_spacing": spacing, "previous_timestep": previous}
        return build_table(SamplerConfig(sampler="ddim", **options)).c_x0

    assert np.array_equal(c_x0("leading", "spacing"), c_x0("leading", "stride"))
    for spacing in ("trailing", "linspace"):
        assert not np.allclose(c_x0(spacing, "spacing"), c_x0(spacing, "stride"), rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_is_finite(name, spacing, steps):
    samplers = [{"variance_type": variance} for variance in VARIANCE_TYPES]
    samplers += [
        {"sampler": "ddim", "eta": eta, "ddim_direction": direction}
        for eta, direction in itertools.product((0.0, 0.5, 1.0), DIRECTIONS)
    ]
    for prediction, sampler in itertools.product(("sample", "v_prediction"), samplers):
        config = SamplerConfig(
            beta_schedule=name,
            rescale_betas_zero_snr=True,
            prediction_type=prediction,
            timestep_spacing=spacing,
            num_inference_steps=steps,
            **sampler,
        )
        assert torch.isfinite(build_table(config).coefficients(dtype=torch.float64)).all()
        assert torch.isfinite(build_table(config).coefficients()).all()


def test_zero_terminal_snr_first_step():
    """Check that a step from pure noise ends at q(x_s | x0) with fresh noise, independent of x_t."""
    table = build_table(
        SamplerConfig(
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            num_inference_steps=10,
        )
    )
    assert (table.a[0], table.b[0], table.c_x[0]) == (0, -1, 0)
    assert table.c_x0[0] ** 2 + table.sigma[0] ** 2 == pytest.approx(1, abs=1e-15)


def test_one_step():
    for spacing, t in (("leading", 0), ("trailing", 999), ("linspace", 0)):
        table = build_table(SamplerConfig(num_inference_steps=1, timestep_spacing=spacing))
        assert len(table) == 1
        assert table.timestep.tolist() == [t]
        assert (table.c_x0[0], table.c_x[0], table.sigma[0]) == (pytest.approx(1, abs=1e-15), 0, 0)


def test_shapes_and_types():
    table = build_table(SamplerConfig(num_inference_steps=50))
    assert len(table) == 50
    assert table.coefficients().shape == (50, len(COLUMNS))
    assert table.coefficients().dtype == torch.float32
    for i, name in enumerate(COLUMNS):
        assert getattr(table, name).dtype == np.float64
        assert np.array_equal(table.coefficients(dtype=torch.float64)[:, i].numpy(), getattr(table, name))
    assert table.ids().dtype == torch.int32
    assert table.ids().tolist() == [[t, t] for t in range(980, -1, -20)]


def test_runs_share_the_noise_of_shared_timesteps():
    short, long = build_table(SamplerConfig(num_inference_steps=50)), build_table(SamplerConfig())
    assert set(short.noise_id.tolist()) <= set(long.noise_id.tolist())
    assert np.array_equal(short.noise_id, short.timestep)
