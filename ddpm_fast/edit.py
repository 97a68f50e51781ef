"""Sampling that begins from images: partial denoising, fusion of two images, inpainting, and DDIM inversion.

All functions run the engine on a `StepTable`. They take the options of `Sampler` (model_kwargs, guidance_scale,
execution, …) and the fields of `SamplerConfig`. The configuration of a checkpoint goes into `config`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.progress import Show
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.q_sample import q_sample
from ddpm_fast.options import ModelOptions
from ddpm_fast.sample import Sampler
from ddpm_fast.schedules import Array
from ddpm_fast.seeding import Seeds, resolve_seeds, seed_tensor
from ddpm_fast.table import StepTable, build_table, previous_alpha_bars
from ddpm_fast.timesteps import Timesteps
from ddpm_fast.validate import checked_start, one_of, whole, within

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("ddpm_fast")

MIXINGS = ("linear", "spherical")
VISIT = 2**20  # added to a step's noise id for each earlier visit of the step; must exceed T


def noised(x_0: Tensor, t: int, config: SamplerConfig, seeds: Seeds, visit: int = 0) -> Tensor:
    """Draw x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4).

    Args:
        x_0: Images, float [B, C, ...].
        t: Timestep in [0, num_train_timesteps).
        config: Configuration with the schedule.
        seeds: One seed a sample, as in `Sampler.__call__`. `kernels.q_sample` makes the noise, from another stream than
            sampling does.
        visit: Number of the draw. Another number gives other noise.

    Returns:
        float32 [B, C, ...].
    """
    whole("t", t, 0, config.num_train_timesteps - 1)
    keys = seed_tensor(resolve_seeds(seeds, len(x_0))).to(x_0.device)
    alpha_bars = torch.from_numpy(config.alphas_cumprod()).to(x_0.device)
    return q_sample(x_0.float().contiguous(), torch.full_like(keys, t), alpha_bars, seeds=keys, visit=visit)


def denoise(
    model: Model,
    x_0: Tensor,
    t: int,
    *,
    seeds: Seeds = None,
    config: SamplerConfig | None = None,
    progress: Show = None,
    **options: "Unpack[ModelOptions]",
) -> Tensor:
    """Noise images to level t and sample from there (SDEdit, Meng et al. 2022).

    Details finer than the noise are drawn anew.

    Args:
        model: Any callable `model(x, t, **model_kwargs)`.
        x_0: Images, float [B, C, ...].
        t: Level of the noise. The run begins at its largest timestep <= t.
        seeds: One seed a sample, as in `Sampler.__call__`.
        config, options: Configuration and options, as for the whole module.
        progress: Progress bar, as in `Sampler.__call__`.

    Returns:
        float32 [B, C, ...].

    Raises:
        ValueError, TypeError: An argument does not fit. Raised before any network call.
    """
    _check_images("x_0", x_0)
    sampler, seeds = _sampler_from_level(model, x_0.shape, t, seeds, config, options)
    start = noised(x_0.to(sampler.device), int(sampler.config.inference_timesteps()[0]), sampler.config, seeds)
    return sampler(seeds=seeds, x_T=start, progress=progress)


def interpolate(
    model: Model,
    x_a: Tensor,
    x_b: Tensor,
    t: int,
    lam: float = 0.5,
    *,
    mixing: str = "linear",
    shared_noise: bool = False,
    rescale: bool = True,
    seeds: Seeds = None,
    config: SamplerConfig | None = None,
    progress: Show = None,
    **options: "Unpack[ModelOptions]",
) -> Tensor:
    """Fuse two images: noise both to level t, mix them, and sample from the mixture.

        signal = w_a x_a + w_b x_b,   noise = w_a z_a + w_b z_b
        x_t    = sqrt(alpha_bar_t) signal + sqrt(1 - alpha_bar_t) noise / |noise|,   |noise| its standard deviation

    Each seed gives another draw, so the image between the two is not unique: draw many. In Ho et al. 2020, section 4.3,
    and in denoising-diffusion-pytorch the noise is not rescaled. The mixture of two independently noised images then
    has too little noise: as much as belongs to an earlier timestep.

    Args:
        model: Any callable `model(x, t, **model_kwargs)`.
        x_a, x_b: Images, float [B, C, ...].
        t: Level of the noise. The run begins at its largest timestep <= t.
        lam: Share of x_b: 0 denoises x_a alone, 1 denoises x_b alone.
        mixing: "linear" takes w = (1 - lam, lam). "spherical" mixes along the great circle between the two noised
            images (Shoemake 1985), sample by sample.
        shared_noise: True takes z_b = z_a.
        rescale: True gives the noise its standard deviation back. False divides by 1 instead of |noise|.
        seeds: One seed a sample, as in `Sampler.__call__`.
        config, options: Configuration and options, as for the whole module.
        progress: Progress bar, as in `Sampler.__call__`.

    Returns:
        float32 [B, C, ...].

    Raises:
        ValueError, TypeError: An argument does not fit. Raised before any network call.
    """
    _check_images("x_a", x_a)
    _check_images("x_b", x_b)
    check_mixture(x_a, x_b, lam, mixing)
    sampler, seeds = _sampler_from_level(model, x_a.shape, t, seeds, config, options)
    start = mixture(
        x_a.to(sampler.device), x_b.to(sampler.device), lam,
        config=sampler.config, mixing=mixing, shared_noise=shared_noise, rescale=rescale, seeds=seeds,
    )  # fmt: skip
    return sampler(seeds=seeds, x_T=start, progress=progress)


def check_mixture(x_a: Tensor, x_b: Tensor, lam: float, mixing: str) -> None:
    """Raise ValueError unless the two images have one shape, and `lam` and `mixing` are allowed."""
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a and x_b must have one shape, got {tuple(x_a.shape)} and {tuple(x_b.shape)}")
    one_of("mixing", mixing, MIXINGS)
    within("lam", lam, 0, 1)


def mixture(
    x_a: Tensor,
    x_b: Tensor,
    lam: float,
    *,
    config: SamplerConfig,
    mixing: str = "linear",
    shared_noise: bool = False,
    rescale: bool = True,
    seeds: Seeds = 0,
) -> Tensor:
    """Return the state from which `interpolate` samples: two images, noised to the config's first timestep, and mixed.

    Args:
        config: Configuration that begins at the level, from `from_level`.
        x_a, x_b, lam, mixing, shared_noise, rescale, seeds: Arguments of `interpolate`.
    """
    check_mixture(x_a, x_b, lam, mixing)
    t = int(config.inference_timesteps()[0])
    alpha_bar = float(config.alphas_cumprod()[t])
    x_a, x_b = x_a.float(), x_b.float()
    z_a = _forward_noise(x_a, t, seeds, 0)
    z_b = z_a if shared_noise else _forward_noise(x_b, t, seeds, 1)
    w_a, w_b = _weights(_mixture(x_a, z_a, alpha_bar), _mixture(x_b, z_b, alpha_bar), lam, mixing)
    noise = w_a * z_a + w_b * z_b
    if rescale:
        noise = noise / ((w_a + w_b) if shared_noise else (w_a.square() + w_b.square()).sqrt())
    return _mixture(w_a * x_a + w_b * x_b, noise, alpha_bar)


def inpaint(
    model: Model,
    known: Tensor,
    mask: Tensor,
    *,
    resamplings: int = 1,
    jump_length: int = 10,
    seeds: Seeds = None,
    config: SamplerConfig | None = None,
    progress: Show = None,
    **options: "Unpack[ModelOptions]",
) -> Tensor:
    """Draw the missing part of images (RePaint, Lugmayr et al. 2022).

    After every step the known pixels are put in, noised to the step's level (eq. 8). The rest was drawn without regard
    to the known pixels, which leaves seams. To remove them, the run goes back to noisier levels again and again
    (algorithm 1).

    Args:
        model: Any callable `model(x, t, **model_kwargs)`.
        known: Images, float [B, C, ...]. Values where the mask is 0 have no effect, but must be finite.
        mask: float in [0, 1] or bool, broadcast to `known`: 1 where the image is known.
        resamplings: Number of times that every stretch of `jump_length` steps is taken. 1 is a plain run. The paper
            takes 10 in a run of 250 steps.
        jump_length: Number of steps that the run goes back.
        seeds: One seed a sample, as in `Sampler.__call__`.
        config, options: Configuration and options, as for the whole module.
        progress: Progress bar, as in `Sampler.__call__`.

    Returns:
        float32 [B, C, ...]. Where the mask is 1, the result is `known` itself.

    Raises:
        ValueError, TypeError: An argument does not fit. Raised before any network call.
    """
    _check_images("known", known)
    config, others = _split_options(config, options)
    table = resampled(config, resamplings, jump_length)
    sampler: Sampler[Tensor] = Sampler(model, known.shape, config=config, table=table, **others)
    return sampler(seeds=seeds, known=known, mask=mask, progress=progress)


def invert(
    model: Model,
    x_0: Tensor,
    *,
    config: SamplerConfig | None = None,
    progress: Show = None,
    **options: "Unpack[ModelOptions]",
) -> Tensor:
    """Return the noise from which DDIM draws these images (Song et al. 2021, sec. 4.3).

    The deterministic steps of DDIM are taken in reverse. Each step takes the network's noise at x_s in place of the
    noise at x_t. The error shrinks as steps are added. `sample(model, x_T.shape, x_T=x_T, sampler="ddim",
    clip_sample=False, …)` returns to the images.

    Args:
        model: Any callable `model(x, t, **model_kwargs)`.
        x_0: Images, float [B, C, ...].
        config, options: Configuration and options, as for the whole module. Sampler, clipping and variance of the
            configuration have no effect.
        progress: Progress bar, as in `Sampler.__call__`.

    Returns:
        x_T, float32 [B, C, ...].

    Raises:
        ValueError, TypeError: An argument does not fit. Raised before any network call.
    """
    _check_images("x_0", x_0)
    config, others = _split_options(config, options)
    config = replace(config, clip_sample=False, thresholding=False, sampler="ddim", eta=0.0)
    sampler: Sampler[Tensor] = Sampler(model, x_0.shape, config=config, table=inverted(config), **others)
    return sampler(seeds=0, x_T=x_0, progress=progress)  # the seed has no effect, since no row draws noise


def from_level(config: SamplerConfig, t: int) -> SamplerConfig:
    """Return the configuration of the last part of a run, from its largest timestep <= t on."""
    whole("t", t, 0, config.num_train_timesteps - 1)
    visited = config.inference_timesteps()
    left = visited[visited <= t]
    if not len(left):
        raise ValueError(f"t must be at least the last timestep of the run, {visited[-1]}, got {t}")
    if config.previous_timestep == "stride" and len(left) < len(visited):
        plain = replace(config, previous_timestep="spacing")
        if np.any(previous_alpha_bars(config, visited) != previous_alpha_bars(plain, visited)):
            raise ValueError("previous_timestep='stride' needs the whole run: take 'spacing'")
        config = plain  # the same run
    return replace(config, timesteps=tuple(left.tolist()), num_inference_steps=None)


def resampled(config: SamplerConfig, resamplings: int, jump_length: int) -> StepTable:
    """Return the table of a run that goes back and forth, as RePaint's (Lugmayr et al. 2022, algorithm 1, appendix B).

    A step to level s is followed by x_t = sqrt(alpha) x_s + sqrt(1 - alpha) z, back to the noisier level t, with
    alpha = alpha_bar_t / alpha_bar_s. Both together are linear in the same three tensors as any step, and therefore one
    row without a further network call:

        c' = sqrt(alpha) c,   sigma'^2 = alpha sigma^2 + 1 - alpha

    Raises:
        ValueError: The variance is learned, so that the table does not hold sigma.
    """
    whole("resamplings", resamplings, 1)
    whole("jump_length", jump_length, 1)
    plain = build_table(config)
    if resamplings == 1:
        return plain
    if plain.learned:
        raise ValueError(f"resamplings need a sigma that the table holds, not variance_type={config.variance_type!r}")
    rows, jumps = _back_and_forth(len(plain), resamplings, jump_length)
    alpha_bars = config.alphas_cumprod()[plain.timestep]
    target = plain.known_scale[rows] ** 2
    reached = np.where(jumps, alpha_bars[np.minimum(rows + 1 - jumps, len(plain) - 1)], target)
    root = np.sqrt(reached / target)
    visits = np.array([np.count_nonzero(rows[:position] == row) for position, row in enumerate(rows)])
    columns = {name: getattr(plain, name)[rows] * root for name in ("c_x0", "c_x", "c_out")}
    sigma = np.sqrt((root * plain.sigma[rows]) ** 2 + 1 - root**2)
    return replace(
        plain,
        timestep=plain.timestep[rows],
        noise_id=plain.noise_id[rows] + VISIT * visits,
        a=plain.a[rows],
        b=plain.b[rows],
        **columns,
        sigma=sigma,
        log_min=plain.log_min[rows],
        log_max=plain.log_max[rows],
        known_scale=np.sqrt(reached),
        known_sigma=np.sqrt(1 - reached),
        draws=sigma != 0,
    )


def _back_and_forth(steps: int, resamplings: int, jump_length: int) -> tuple[Timesteps, Timesteps]:
    """Return RePaint's schedule: the row of every step, and the number of steps that the run jumps back after it."""
    left = dict.fromkeys(range(steps - 2, jump_length - 2, -jump_length), resamplings - 1)
    rows, jumps, row = [], [], 0
    while row < steps:
        rows.append(row)
        jump = jump_length if left.get(row, 0) > 0 else 0
        if jump:
            left[row] -= 1
        jumps.append(jump)
        row += 1 - jump
    return np.array(rows), np.array(jumps)


def inverted(config: SamplerConfig) -> StepTable:
    """Return the rows of DDIM from data to noise: each goes from the level s that the run's step reaches from t to t.

        x0  = (x_s - sqrt(1 - alpha_bar_s) epsilon) / sqrt(alpha_bar_s)
        x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) epsilon

    epsilon is the network's output at (x_s, t). The step from t to s would take the output at (x_t, t).

    Raises:
        ValueError: The network predicts x_0, whose epsilon has no value at the data.
    """
    falling = config.inference_timesteps()
    t, alpha_bar_s = falling[::-1].copy(), previous_alpha_bars(config, falling)[::-1]
    alpha_bar_t = config.alphas_cumprod()[t]
    signal, deviation = np.sqrt(alpha_bar_s), np.sqrt(1 - alpha_bar_s)
    new_signal, new_deviation = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
    columns: dict[str, Array]
    if config.prediction_type == "epsilon":
        columns = {"a": 1 / signal, "b": -deviation / signal, "c_x0": new_signal, "c_out": new_deviation}
    elif config.prediction_type == "v_prediction":  # epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x
        columns = {
            "a": signal, "b": -deviation, "c_x0": new_signal, "c_x": new_deviation * deviation,
            "c_out": new_deviation * signal,
        }  # fmt: skip
    else:
        raise ValueError("DDIM's inversion takes networks that predict epsilon or v, not prediction_type='sample'")
    doubled = config.variance_type.startswith("learned")
    return StepTable.of(t, columns, draws=np.zeros(len(t), bool), doubled=doubled)


def _split_options(config: SamplerConfig | None, options: ModelOptions) -> tuple[SamplerConfig, dict[str, Any]]:
    """Return the config changed by the options that are its fields, and the other options."""
    fields = SamplerConfig.__dataclass_fields__.keys()
    changes = {name: value for name, value in options.items() if name in fields}
    return SamplerConfig.from_options(changes, config), {n: value for n, value in options.items() if n not in fields}


def _sampler_from_level(
    model: Model, shape: Sequence[int], t: int, seeds: Seeds, config: SamplerConfig | None, options: ModelOptions
) -> tuple[Sampler[Tensor], list[int]]:
    """Return the sampler of a run's last part, from level t on, and one seed a sample. Drawn seeds are logged."""
    config, others = _split_options(config, options)
    config = from_level(config, t)
    resolved = resolve_seeds(seeds, shape[0])
    if seeds is None:
        logger.info("drew seeds %d … %d", resolved[0], resolved[-1])
    return Sampler(model, shape, config=config, **others), resolved


def _check_images(name: str, images: Tensor) -> None:
    """Raise ValueError unless `images` is a finite float tensor [B, C, ...]."""
    if not isinstance(images, Tensor) or images.dim() < 2:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a float tensor of shape (batch, channels, ...), got {got}")
    checked_start(images, tuple(images.shape), name)


def _forward_noise(x: Tensor, t: int, seeds: Seeds, visit: int) -> Tensor:
    """Return the noise of `kernels.q_sample` at timestep t, in the shape of x."""
    keys = seed_tensor(resolve_seeds(seeds, len(x))).to(x.device)
    return normal(keys, torch.full_like(keys, t), Stream.FORWARD, tuple(x.shape[1:]), visit=visit)


def _mixture(signal: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """Return sqrt(alpha_bar) signal + sqrt(1 - alpha_bar) noise."""
    return math.sqrt(alpha_bar) * signal + math.sqrt(1 - alpha_bar) * noise


def _weights(a: Tensor, b: Tensor, lam: float, mixing: str) -> tuple[Tensor, Tensor]:
    """Return the weights of two noised images, [B, 1, ...] each."""
    shape = (-1, *(1,) * (a.dim() - 1))
    if mixing == "linear":
        one = torch.ones(len(a), dtype=torch.float32, device=a.device).view(shape)
        return (1 - lam) * one, lam * one
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-4)  # equal images: any weights that sum to 1 are right
    weights = [((1 - lam) * angle).sin() / angle.sin(), (lam * angle).sin() / angle.sin()]
    return weights[0].float().view(shape), weights[1].float().view(shape)
