"""The likelihood of images under a model: the variational bound in bits per dimension (Ho et al. 2020, eq. 5)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_fast.config import ConfigOptions, SamplerConfig, listed
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.progress import ProgressBar, Show
from ddpm_fast.kernels.dispatch import on_device
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.schedules import Array
from ddpm_fast.seeding import Seeds, resolve_seeds, seed_tensor
from ddpm_fast.table import StepTable, build_table, posterior_deviation, posterior_variance, previous_alpha_bars
from ddpm_fast.timesteps import Timesteps
from ddpm_fast.validate import checked_start, whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

HALF_BIN = 1 / 255  # half the distance of 256 values on [-1, 1]
SMALLEST = 1e-12  # smallest probability of a bin, as in Ho et al.'s own code


@dataclass(frozen=True)
class Likelihood:
    """The bound of N images, in bits per dimension. The timesteps descend, as in sampling.

    Attributes:
        total: float64 [N]. An upper bound of -log2 p(x_0) / dimensions, in expectation over the noise of x_t.
        prior: float64 [N]. L_T = KL(q(x_T | x_0) || N(0, I)).
        terms: float64 [N, steps]. L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). The last term is -log p(x_0
            | x_1) of the discretised decoder (eq. 13).
        epsilon_mse, x0_mse: float64 [N, steps]. Mean squared errors of the epsilon and of the x0 prediction.
        timesteps: int64 [steps].
        seeds: Seeds of the noise, one an image.
    """

    total: Array
    prior: Array
    terms: Array
    epsilon_mse: Array
    x0_mse: Array
    timesteps: Timesteps
    seeds: list[int]


def prior_bits(x_0: Tensor, alpha_bar_T: float) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, I)) in bits per dimension: float64 [N]. No step can reduce this term."""
    mean_square = alpha_bar_T * x_0.double().flatten(1).square().mean(1)
    return 0.5 * (mean_square - alpha_bar_T - math.log1p(-alpha_bar_T)) / math.log(2)


@listed(SamplerConfig)
def bits_per_dimension(
    model: Model,
    x_0: Tensor,
    *,
    batch_size: int = 64,
    seeds: Seeds = 0,
    model_kwargs: Mapping[str, object] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: SamplerConfig | None = None,
    progress: Show = None,
    **options: "Unpack[ConfigOptions]",
) -> Likelihood:
    """Compute the bound for the run that `config` describes, every term from one draw of x_t.

    The x0 prediction is clipped as in sampling, so that p is the law of the samples. The decoder's beta_tilde is zero.
    As in OpenAI's guided-diffusion, the beta_tilde of the step before replaces it.

    Args:
        model: Any callable `model(x, t, **model_kwargs)`.
        x_0: float [N, C, ...] on [-1, 1], with 256 possible values: pixel / 127.5 - 1.
        batch_size: Number of images a batch.
        seeds: Seeds of the noise of x_t, one an image, as in `Sampler.__call__`.
        model_kwargs: Keywords for the model. Tensors with N rows are cut into batches with the images.
        device, dtype: Device and dtype, as in `Sampler`.
        config, options: `SamplerConfig` and its fields. It must be DDPM without thresholding, at temperature 1.
        progress: Progress bar, as in `Sampler.__call__`.

    Raises:
        ValueError, TypeError: An argument does not fit, or a value is outside [-1, 1]. Raised before any network call.
        FloatingPointError: The model returned NaN or infinity. The message names the timestep.
    """
    config = SamplerConfig.from_options(options, config)
    _check(config, x_0)
    whole("batch_size", batch_size, 1)
    table, all_seeds = build_table(config), resolve_seeds(seeds, len(x_0))
    variances = _variances(config)
    batches = _batches(x_0, model_kwargs or {}, all_seeds, batch_size)
    results = []
    network: Network | None = None
    bar: ProgressBar | None = None
    try:
        for images, kwargs, batch_seeds in batches:
            if network is None or len(images) != network.batch:
                call = Call.of(model, tuple(images.shape), model_kwargs=kwargs, device=device, dtype=dtype)
                network = Network(call, table.doubled)
            else:
                network.update(network.call.with_kwargs(kwargs, None))
            if bar is None:
                bar = ProgressBar(len(table) * len(batches), network.device, progress)
            with on_device(network.device), torch.no_grad():
                images = images.to(network.device)
                results.append(_terms(network, images, table, variances, config, batch_seeds, bar))
    finally:
        if bar is not None:
            bar.close(len(results) == len(batches))
    prior = prior_bits(x_0, float(config.alphas_cumprod()[table.timestep[0]])).cpu().numpy()
    terms, epsilon_mse, x0_mse = (torch.cat(column).cpu().numpy() for column in zip(*results, strict=True))
    total = prior + terms.sum(1)
    return Likelihood(total, prior, terms, epsilon_mse, x0_mse, table.timestep, all_seeds)


def _batches(
    x_0: Tensor, model_kwargs: Mapping[str, object], seeds: list[int], size: int
) -> list[tuple[Tensor, dict[str, object], list[int]]]:
    """Return images, keywords and seeds in batches. Tensors with a row an image are cut, other keywords repeated."""
    batches = []
    for start in range(0, len(x_0), size):
        rows = slice(start, start + size)
        kwargs = {
            name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == x_0.shape[:1] else value
            for name, value in model_kwargs.items()
        }
        batches.append((x_0[rows], kwargs, seeds[rows]))
    return batches


def _terms(
    network: Network,
    x_0: Tensor,
    table: StepTable,
    variances: tuple[Array, Array],
    config: SamplerConfig,
    seeds: list[int],
    bar: ProgressBar,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms, the epsilon errors and the x0 errors of a batch: float64 [B, steps] each."""
    alpha_bars = torch.from_numpy(config.alphas_cumprod())
    keys, on_device_bars = seed_tensor(seeds).to(x_0.device), alpha_bars.to(x_0.device)
    beta_tilde, sigma_square = variances
    columns: list[tuple[Tensor, ...]] = []
    x_0 = x_0.float().contiguous()
    exact = x_0.double()
    channels = x_0.shape[1]
    for row, t in enumerate(table.timestep.tolist()):
        x_t = q_sample(x_0, torch.full_like(keys, t), on_device_bars, seeds=keys)
        network.input.copy_(x_t)
        network.timestep.fill_(t)
        output = network().double()
        out, v = output[:, :channels], output[:, channels:]
        x0 = float(table.a[row]) * x_t.double() + float(table.b[row]) * out
        if config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        if table.learned:
            log_min = float(table.log_min[row])
            if row == len(table) - 1 and config.variance_type == "learned_range":
                log_min = math.log(float(beta_tilde[row - 1]))
            share = (v + 1) / 2
            log_variance = share * float(table.log_max[row]) + (1 - share) * log_min
        else:
            log_variance = torch.full_like(x0, math.log(float(sigma_square[row])))
        if row == len(table) - 1:
            mean = float(table.c_x0[row]) * x0 + float(table.c_x[row]) * x_t.double()
            nats = -log_decoder(exact, mean, log_variance)
        else:
            log_true = torch.full_like(x0, math.log(float(beta_tilde[row])))
            nats = gaussian_kl(float(table.c_x0[row]) * (exact - x0), log_true, log_variance)
        bits = nats.flatten(1).mean(1) / math.log(2)
        if not bool(torch.isfinite(bits).all()):
            raise FloatingPointError(f"the model returned NaN or infinity at timestep {t}")
        alpha_bar = float(alpha_bars[t])
        x0_mse = (exact - x0).square().flatten(1).mean(1)
        columns.append((bits, x0_mse * alpha_bar / (1 - alpha_bar), x0_mse))
        bar.advance(1)
    bits, epsilon_mse, x0_mse = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return bits, epsilon_mse, x0_mse


def _variances(config: SamplerConfig) -> tuple[Array, Array]:
    """Return beta_tilde and sigma^2 of every row. If sigma^2 of the last row is zero, the row before replaces it."""
    t = config.inference_timesteps()
    alpha_bar, alpha_bar_s = config.alphas_cumprod()[t], previous_alpha_bars(config, t)
    beta_tilde = posterior_variance(alpha_bar, alpha_bar_s)
    sigma_square = posterior_deviation(config.variance_type, alpha_bar, alpha_bar_s, beta_tilde) ** 2
    if sigma_square[-1] == 0 and len(t) > 1:
        sigma_square[-1] = sigma_square[-2]
    return beta_tilde, sigma_square


def gaussian_kl(difference: Tensor, log_true: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(m + difference, true) || N(m, variance)) in nats, element by element."""
    ratios = torch.exp(log_true - log_variance) + difference.square() * torch.exp(-log_variance)
    return 0.5 * (log_variance - log_true + ratios - 1)


def log_decoder(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log p of the bin of x under N(mean, variance) (Ho et al. 2020, eq. 13).

    The outermost bins reach to infinity.
    """
    inverse = torch.exp(-0.5 * log_variance)
    above, below = (x - mean + HALF_BIN) * inverse, (x - mean - HALF_BIN) * inverse
    above = torch.where(x > 1 - HALF_BIN / 2, torch.inf, above)
    below = torch.where(x < -1 + HALF_BIN / 2, -torch.inf, below)
    flipped = below > 0  # where both distribution functions are near 1, use the other tail, which keeps the digits
    above, below = torch.where(flipped, -below, above), torch.where(flipped, -above, below)
    high, low = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    log_p: Tensor = high + torch.log1p(-torch.exp(low - high))
    return log_p.clamp(min=math.log(SMALLEST))


def _check(config: SamplerConfig, x_0: Tensor) -> None:
    """Raise ValueError unless the bound is defined for the configuration and the images."""
    if config.sampler != "ddpm":
        raise ValueError(f"the bound is DDPM's, got sampler={config.sampler!r}")
    small = config.variance_type in ("fixed_small", "fixed_small_log", "learned_range")
    if small and len(config.inference_timesteps()) < 2:
        raise ValueError(f"one step of variance_type={config.variance_type!r} has no beta_tilde: take 'fixed_large'")
    if config.thresholding or config.temperature != 1:
        raise ValueError("the bound is that of a run at temperature 1 without dynamic thresholding")
    if not isinstance(x_0, Tensor) or x_0.dim() < 2:
        raise ValueError("x_0 must be a float tensor of shape (images, channels, ...)")
    checked_start(x_0, tuple(x_0.shape), "x_0")
    if not len(x_0):
        raise ValueError("x_0 must hold at least one image")
    low, high = float(x_0.min()), float(x_0.max())
    if low < -1 - 1e-6 or high > 1 + 1e-6:
        raise ValueError(f"x_0 must lie on [-1, 1], got values from {low:g} to {high:g}")


def schedule_report(config: SamplerConfig) -> dict[str, float]:
    """Measure how near a schedule gets to pure noise.

    Returns:
        signal: sqrt(alpha_bar_T), the share of the image that is left at the end.
        prior_bits: KL(q(x_T | x_0) || N(0, I)) in bits per dimension, for data of mean square 1, the largest on [-1,
            1].
    """
    alpha_bar = float(config.alphas_cumprod()[-1])
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    return {"signal": math.sqrt(alpha_bar), "prior_bits": float(prior_bits(one, alpha_bar))}
