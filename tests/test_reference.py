"""Tests of the textbook sampler: the definition of the chain, linear algebra, and a case with a known answer."""

import ast
import inspect
import itertools

import pytest
import scipy.stats
import torch

import ddpm_fast.reference
from ddpm_fast.reference import Diffusion

T = 60
BETAS = torch.linspace(1e-3, 0.2, T, dtype=torch.float64)
CHAIN = Diffusion(BETAS)
ONE, ZERO = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-14}  # at most 60 roundings in float64, and 1 - alpha_bar >= 1e-3
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected, dtype=torch.float64), **EXACT)


def test_it_imports_torch_alone():
    tree = ast.parse(inspect.getsource(ddpm_fast.reference))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert imported == {"collections.abc", "torch"}


# The forward process


def test_composed_forward_steps_are_the_closed_form():
    """Compose x_t = signal x_0 + noise of variance `variance` from single q_steps, by its coefficients."""
    signal, variance = ONE, ZERO
    for t in range(T):
        signal = CHAIN.q_step(signal, t, ZERO)
        variance = CHAIN.q_step(ONE, t, ZERO) ** 2 * variance + CHAIN.q_step(ZERO, t, ONE) ** 2
        close(CHAIN.q_sample(ONE, t, ZERO), signal)
        close(CHAIN.q_sample(ZERO, t, ONE) ** 2, variance)
        close(signal**2 + variance, ONE)  # variance preserving


def test_forward_steps_in_law():
    n = 20_000
    x = torch.full((n,), 0.8, dtype=torch.float64)
    for t in range(T):
        x = CHAIN.q_step(x, t, randn(t, n))
        if t in (0, 5, T - 1):
            mean, deviation = CHAIN.alphas_bar[t].sqrt() * 0.8, (1 - CHAIN.alphas_bar[t]).sqrt()
            # The draw is fixed. A wrong law would give a far smaller p.
            assert scipy.stats.kstest((x - mean) / deviation, "norm").pvalue > 1e-3


def test_x_T_is_noise():
    assert CHAIN.alphas_bar[-1] < 2e-3
    assert (CHAIN.alphas_bar.diff() < 0).all()


@pytest.mark.parametrize("t", [1, 2, 30, T - 1])
def test_posterior_is_conditioning_of_the_joint_gaussian(t):
    """Derive q(x_{t-1} | x_t, x_0) from the covariance of (x_{t-1}, x_t) given x_0."""
    x_0, x_t = 0.7, -1.3
    before = CHAIN.alphas_bar[t - 1]
    alpha = 1 - BETAS[t]
    mean_before, mean = before.sqrt() * x_0, (alpha * before).sqrt() * x_0
    var_before, var = 1 - before, alpha * (1 - before) + BETAS[t]
    covariance = alpha.sqrt() * var_before
    posterior = CHAIN.q_posterior(x_0 * ONE, x_t * ONE, t)
    close(posterior[0], (mean_before + covariance / var * (x_t - mean)) * ONE)
    close(posterior[1], var_before - covariance**2 / var)


def test_posterior_at_0_is_x_0():
    mean, variance = CHAIN.q_posterior(0.7 * ONE, -1.3 * ONE, 0)
    close(mean, 0.7 * ONE)
    assert variance == 0


# Respacing


@pytest.mark.parametrize("kept", [[0], [T - 1], [59, 30, 7, 0], [10, 20, 30], range(T)], ids=str)
def test_respaced_marginals(kept):
    short = CHAIN.respaced(kept)
    assert short.timesteps == sorted(kept)
    close(short.alphas_bar, CHAIN.alphas_bar[sorted(kept)])
    close(short.alphas, 1 - short.betas)


def test_respaced_chain_composes_to_the_long_one():
    short = CHAIN.respaced([3, 20, 59])
    signal, variance = ONE, ZERO
    for i, t in enumerate(short.timesteps):
        signal = short.q_step(signal, i, ZERO)
        variance = short.q_step(ONE, i, ZERO) ** 2 * variance + short.q_step(ZERO, i, ONE) ** 2
        close(signal, CHAIN.q_sample(ONE, t, ZERO))
        close(variance, CHAIN.q_sample(ZERO, t, ONE) ** 2)


def test_the_network_gets_the_original_timesteps():
    timesteps = []

    def model(x, t):
        assert t.dtype == torch.int64
        assert t.shape == (2,)
        timesteps.append(int(t[0]))
        return torch.zeros_like(x)

    short = CHAIN.respaced([3, 20, 59])
    noises = randn(0, 3, 2, 1)
    short.sample(model, randn(1, 2, 1), noises)
    short.ddim_sample(model, randn(1, 2, 1), noises)
    assert timesteps == [59, 20, 3] * 2
    timesteps.clear()
    Diffusion(BETAS[:2], timesteps=[5, 8]).sample(model, randn(1, 2, 1), noises)
    assert timesteps == [8, 5]


# The reverse process


def perfect(chain, x_0, prediction):
    """Return the perfect network of a single point x_0: its noise is x_t without the signal."""
    index = {name: i for i, name in enumerate(chain.timesteps)}

    def model(x, t):
        alpha_bar = chain.alphas_bar[index[int(t[0])]]
        epsilon = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return {
            "epsilon": epsilon,
            "sample": torch.full_like(x, x_0),
            "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0,
        }[prediction]

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 1, 30, T - 1])
def test_predicted_x_0(t, prediction):
    x_0, noise = randn(0, 2, 3), randn(1, 2, 3)
    signal, deviation = CHAIN.alphas_bar[t].sqrt(), (1 - CHAIN.alphas_bar[t]).sqrt()
    output = {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - deviation * x_0}[prediction]
    close(CHAIN.predict_x_0(CHAIN.q_sample(x_0, t, noise), t, output, prediction), x_0)


def propagate(run):
    """Return mean and variance after every step of `run(x_T, noises)`, for x_T and noises ~ N(0, 1).

    The state is affine in x_T and in the noises.
    """
    steps = len(run(ZERO, [ZERO] * T))
    offsets = run(ZERO, [ZERO] * steps)
    units = [run(ONE, [ZERO] * steps)]
    units += [run(ZERO, [ONE if i == j else ZERO for j in range(steps)]) for i in range(steps)]
    variances = [sum((unit[i] - offsets[i]) ** 2 for unit in units) for i in range(steps)]
    return offsets, variances


@pytest.mark.parametrize("kept", [range(12), [59, 41, 20, 7, 0], [58, 30, 12]], ids=["ddpm", "respaced", "late"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim0", "ddim0.5", "ddim1"])
def test_runs_keep_the_marginals_exactly(sampler, prediction, kept):
    """Check mean and variance of every x_t ~ q(x_t | x_0), for a perfect network of a point and x_T ~ q(x_T | x_0)."""
    x_0 = 0.6
    chain = CHAIN.respaced(kept)
    model = perfect(chain, x_0, prediction)

    def run(z, noises):
        x_T = chain.q_sample(x_0 * ONE, len(chain.betas) - 1, z)
        if sampler == "ddpm":
            return chain.sample(model, x_T, noises, prediction_type=prediction, clip=None)
        return chain.ddim_sample(model, x_T, noises, float(sampler[4:]), prediction, clip=None)

    means, variances = propagate(run)
    for t, mean, variance in zip(reversed(range(len(chain.betas) - 1)), means, variances, strict=False):
        torch.testing.assert_close(mean, chain.q_sample(x_0 * ONE, t, ZERO), rtol=1e-11, atol=1e-12)
        # The variances are differences of runs, each rounded at 1e-16.
        torch.testing.assert_close(variance, chain.q_sample(ZERO, t, ONE) ** 2, rtol=1e-11, atol=1e-12)
    close(means[-1], x_0 * ONE)
    assert variances[-1] < 1e-28


@pytest.mark.parametrize("kept", [range(T), [59, 41, 20, 7, 0]], ids=["all", "respaced"])
def test_gaussian_data_come_back_exactly(kept):
    """Check x_t ~ q(x_t) at every step, for x_0 ~ N(m, s^2), whose best network and variance have closed forms."""
    m, s = 0.3, 0.4
    chain = CHAIN.respaced(kept)
    marginal = chain.alphas_bar * s**2 + 1 - chain.alphas_bar
    unknown = s**2 * (1 - chain.alphas_bar) / marginal  # Var(x_0 | x_t)
    before = torch.cat([torch.ones(1, dtype=torch.float64), chain.alphas_bar[:-1]])
    beta_tilde = chain.betas * (1 - before) / (1 - chain.alphas_bar)
    total = beta_tilde + before * (chain.betas / (1 - chain.alphas_bar)) ** 2 * unknown  # Var(x_{t-1} | x_t)

    def model(x, t):
        i = chain.timesteps.index(int(t[0]))
        root = chain.alphas_bar[i].sqrt()
        x_0 = m + root * s**2 / marginal[i] * (x - root * m)
        return torch.cat([x_0, total[i].log().expand_as(x)], dim=1)

    def run(z, noises):
        x_T = chain.alphas_bar[-1].sqrt() * m + marginal[-1].sqrt() * z
        return chain.sample(model, x_T, noises, prediction_type="sample", variance_type="learned", clip=None)

    means, variances = propagate(run)
    for t, mean, variance in zip(reversed(range(len(chain.betas) - 1)), means, variances, strict=False):
        torch.testing.assert_close(mean, chain.alphas_bar[t].sqrt() * m * ONE, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(variance, marginal[t] * ONE, rtol=1e-11, atol=1e-12)  # differences of runs
    close(means[-1], m * ONE)
    torch.testing.assert_close(variances[-1], (s**2 - unknown[0]) * ONE, rtol=1e-11, atol=1e-12)  # the last step: E


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_fixed_variances(variance):
    x, out, noise = randn(0, 2, 3), randn(1, 2, 3), randn(2, 2, 3)
    for t in (1, 30):
        noisy = CHAIN.p_sample(lambda x, t: out, x, t, noise, variance_type=variance)
        mean = CHAIN.p_sample(lambda x, t: out, x, t, torch.zeros_like(x), variance_type=variance)
        sigma2 = BETAS[t]
        if "small" in variance:
            sigma2 = BETAS[t] * (1 - CHAIN.alphas_bar[t - 1]) / (1 - CHAIN.alphas_bar[t])
        torch.testing.assert_close(noisy - mean, sigma2.sqrt() * noise, rtol=1e-11, atol=1e-13)


def test_learned_variances():
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    close(CHAIN.p_variance(30, "learned", v), v.exp())
    small, large = CHAIN.p_variance(30, "fixed_small", v), CHAIN.p_variance(30, "fixed_large", v)
    between = CHAIN.p_variance(30, "learned_range", v)
    close(between, torch.stack([small, (small * large).sqrt(), large]))


def test_second_half_of_the_channels_is_the_variance():
    x, out, noise, v = (randn(seed, 2, 3, 4) for seed in range(4))
    both = torch.cat([out, v], dim=1)
    noisy = CHAIN.p_sample(lambda x, t: both, x, 30, noise, variance_type="learned")
    mean = CHAIN.p_sample(lambda x, t: out, x, 30, torch.zeros_like(x))
    torch.testing.assert_close(noisy - mean, (v / 2).exp() * noise, rtol=1e-11, atol=1e-13)


def test_clip_and_temperature():
    x, out, noise = 2 * randn(0, 2, 3), randn(1, 2, 3), randn(2, 2, 3)
    t = 40

    def sample(**options):
        return CHAIN.p_sample(lambda x, t: out, x, t, noise, **options)

    for clip in (None, 1.0, 0.4):
        x_0 = CHAIN.predict_x_0(x, t, out)
        assert x_0.abs().max() > 1
        x_0 = x_0 if clip is None else x_0.clip(-clip, clip)
        mean, variance = CHAIN.q_posterior(x_0, x, t)
        close(sample(clip=clip), mean + variance.sqrt() * noise)
        close(sample(clip=clip, temperature=0.5), mean + 0.5 * variance.sqrt() * noise)
        close(sample(clip=clip, temperature=0.0), mean)


def test_options_reach_every_step():
    x_T, noises = randn(0, 2, 3), randn(1, T, 2, 3)
    options = {"prediction_type": "v_prediction", "variance_type": "fixed_large", "clip": 0.4, "temperature": 0.5}
    x = x_T
    for t, noise in zip(reversed(range(T)), noises, strict=True):
        x = CHAIN.p_sample(lambda x, t: torch.sin(3 * x), x, t, noise, **options)
    close(CHAIN.sample(lambda x, t: torch.sin(3 * x), x_T, noises, **options)[-1], x)


def test_last_step_is_quiet():
    x, out = randn(0, 2, 3), randn(1, 2, 3)
    quiet = CHAIN.p_sample(lambda x, t: out, x, 0, torch.zeros_like(x), variance_type="fixed_large")
    assert torch.equal(CHAIN.p_sample(lambda x, t: out, x, 0, 100 * x, variance_type="fixed_large"), quiet)


def test_ddim_direction_matters_where_x_0_is_clipped():
    outputs = 3 * randn(1, 5, 2, 3)

    def run(direction, clip):
        calls = iter(outputs)
        chain = CHAIN.respaced([59, 40, 20, 10, 0])
        return chain.ddim_sample(
            lambda x, t: next(calls), randn(0, 2, 3), randn(2, 5, 2, 3), clip=clip, direction=direction
        )[-1]

    torch.testing.assert_close(run("x0", None), run("output", None), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(run("x0", 1.0), run("output", 1.0), atol=1e-2)


def test_ddim_with_eta_one_and_the_clipped_direction_is_ddpm():
    chain = CHAIN.respaced([59, 40, 20, 10, 0])
    noises, x_T = randn(2, 5, 2, 3), randn(0, 2, 3)

    def model(x, t):
        return 2 * torch.sin(x + t[:, None])

    for a, b in zip(
        chain.sample(model, x_T, noises), chain.ddim_sample(model, x_T, noises, 1.0, direction="x0"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_dtype_is_that_of_the_betas():
    for dtype in (torch.float32, torch.float64):
        chain = Diffusion(BETAS.to(dtype)).respaced([59, 30, 0])
        x_T, noises = randn(0, 2, 3).to(dtype), randn(1, 3, 2, 3).to(dtype)
        for x in itertools.chain(
            chain.sample(lambda x, t: x, x_T, noises), chain.ddim_sample(lambda x, t: x, x_T, noises, 0.5)
        ):
            assert x.dtype == dtype


def test_float32_is_near_float64():
    x_T, noises = randn(0, 2, 3), randn(1, T, 2, 3)
    exact = CHAIN.sample(lambda x, t: torch.sin(x), x_T, noises)[-1]
    rounded = Diffusion(BETAS.float()).sample(lambda x, t: torch.sin(x), x_T.float(), noises.float())[-1]
    # 60 steps of rounding at 6e-8, and coefficients near t = 0 known to 6e-8 / 1e-3
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=5e-4)
    assert not torch.equal(rounded.double(), exact)
