"""A diffusers scheduler as a table, in diffusers' own float32 order.

diffusers computes betas, their products and every coefficient in float32. The table keeps that rounding, to give the
same images. Two of diffusers' variance types are wrong there: fixed_large_log is the square root of a logarithm, and
NaN; here it has the law of fixed_large. "learned" is refused by name.
"""

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ddpm_fast.schedules import Array
from ddpm_fast.table import MIN_VARIANCE, Clipping, StepTable
from ddpm_fast.timesteps import check_range

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


def table_of(
    scheduler: DDPMScheduler | DDIMScheduler,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    doubled: bool = False,
    only_valid: bool = True,
) -> StepTable:
    """Return the rows of `scheduler.timesteps`, in their order.

    Args:
        scheduler: A scheduler after `set_timesteps`.
        eta, use_clipped_model_output: See DDIMScheduler.step.
        doubled: Whether the network's output has a variance half that the scheduler does not read.
        only_valid: Whether a timestep outside of the schedule is an error; otherwise its row means nothing.

    Raises:
        ValueError: A field of the scheduler's config is not supported; the message names the field. Or a timestep does
            not exist (steps_offset=1 with all timesteps).
    """
    check_config(scheduler)
    if not 0 <= eta < np.inf:
        raise ValueError(f"eta must be a number >= 0, got {eta!r}")
    t = scheduler.timesteps.to("cpu", torch.int64)
    alpha_bars = scheduler.alphas_cumprod.to("cpu", torch.float32)
    if only_valid:
        check_range(t.clamp(min=0).numpy(), len(alpha_bars))  # to diffusers, -1 is the last one
    t = t.clamp(max=len(alpha_bars) - 1)
    if isinstance(scheduler, DDPMScheduler):
        return _ddpm_table(scheduler, t, alpha_bars, doubled)
    return _ddim_table(scheduler, t, alpha_bars, float(eta), use_clipped_model_output, doubled)


def clipping_of(scheduler: DDPMScheduler | DDIMScheduler) -> Clipping:
    """Return what the scheduler does to the x0 prediction."""
    config = scheduler.config
    if config.thresholding:
        return Clipping(ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value)
    return Clipping(limit=config.clip_sample_range if config.clip_sample else None)


def check_config(scheduler: DDPMScheduler | DDIMScheduler) -> None:
    """Raise ValueError for a config that is not supported; the message names the field."""
    config = scheduler.config
    if config.prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {PREDICTIONS}, got {config.prediction_type!r}")
    if config.thresholding and not config.sample_max_value >= 1:
        raise ValueError(f"sample_max_value must be >= 1 with thresholding, got {config.sample_max_value!r}")
    if not isinstance(scheduler, DDPMScheduler) or scheduler.variance_type in VARIANCES:
        return
    if scheduler.variance_type == "learned":
        raise ValueError(
            "variance_type='learned' is not supported: diffusers takes the square root of the network's output, which "
            "is a log-variance in the models trained so (NaN wherever it is negative); use 'learned_range', or "
            "ddpm_fast.sample.Sampler, where 'learned' is a log-variance"
        )
    raise ValueError(f"variance_type must be one of {VARIANCES}, got {scheduler.variance_type!r}")


def _ddpm_table(scheduler: DDPMScheduler, t: Tensor, alpha_bars: Tensor, doubled: bool) -> StepTable:
    respaced = scheduler.custom_timesteps or scheduler.num_inference_steps
    s = torch.cat([t[1:], t.new_tensor([-1])]) if respaced else t - 1
    alpha_bar = alpha_bars[t]
    alpha_bar_s = torch.where(s >= 0, alpha_bars[s.clamp(min=0)], 1.0)
    alpha = alpha_bar / alpha_bar_s
    beta_bar, beta_bar_s, beta = 1 - alpha_bar, 1 - alpha_bar_s, 1 - alpha
    # Ho et al. 2020, eq. 7.
    c_x0 = alpha_bar_s**0.5 * beta / beta_bar
    c_x = alpha**0.5 * beta_bar_s / beta_bar
    beta_tilde = (beta_bar_s / beta_bar * beta).clamp(min=MIN_VARIANCE)
    noisy = t > 0  # diffusers adds no noise at t = 0, but does so at a last step with t > 0
    learned = scheduler.variance_type == "learned_range"
    variance = beta if scheduler.variance_type.startswith("fixed_large") else beta_tilde
    columns = {
        **_x0_columns(scheduler, alpha_bar),
        "c_x0": _array(c_x0),
        "c_x": _array(c_x),
        "sigma": _array(noisy * (torch.ones_like(beta) if learned else variance**0.5)),
    }
    if learned:
        columns |= {"log_min": _array(beta_tilde.log()), "log_max": _array(beta.clamp(min=MIN_VARIANCE).log())}
    return StepTable.of(t.numpy(), columns, draws=noisy.numpy(), learned=learned, doubled=learned or doubled)


def _ddim_table(
    scheduler: DDIMScheduler, t: Tensor, alpha_bars: Tensor, eta: float, clipped: bool, doubled: bool
) -> StepTable:
    s = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = alpha_bars[t]
    alpha_bar_s = torch.where(s >= 0, alpha_bars[s.clamp(min=0)], scheduler.final_alpha_cumprod.cpu())
    beta_bar = 1 - alpha_bar
    variance = (1 - alpha_bar_s) / beta_bar * (1 - alpha_bar / alpha_bar_s)
    sigma = eta * variance**0.5
    if (1 - alpha_bar_s < sigma**2).any():
        raise ValueError(f"eta={eta:g} makes more noise than there is at some step: it must be at most 1")
    direction = (1 - alpha_bar_s - sigma**2) ** 0.5
    # Song et al. 2021, eq. 12: sqrt(alpha_bar_s) x0 + direction epsilon, epsilon linear in x_t, x0 and the output.
    root_alpha, root_beta = _array(alpha_bar**0.5), _array(beta_bar**0.5)
    d, root_alpha_s = _array(direction), _array(alpha_bar_s**0.5)
    if clipped:
        of_x, of_x0, of_out = 1 / root_beta, -root_alpha / root_beta, np.zeros_like(d)
    else:
        prediction = scheduler.config.prediction_type
        of_x0 = np.zeros_like(d)
        of_x = {"epsilon": 0 * d, "sample": 1 / root_beta, "v_prediction": root_beta}[prediction]
        of_out = {"epsilon": 0 * d + 1, "sample": -root_alpha / root_beta, "v_prediction": root_alpha}[prediction]
    columns = {
        **_x0_columns(scheduler, alpha_bar),
        "c_x0": root_alpha_s + d * of_x0,
        "c_x": d * of_x,
        "c_out": d * of_out,
        "sigma": _array(sigma),
    }
    return StepTable.of(t.numpy(), columns, draws=np.full(len(t), eta > 0), doubled=doubled)


def _x0_columns(scheduler: DDPMScheduler | DDIMScheduler, alpha_bar: Tensor) -> dict[str, Array]:
    """Return columns a and b of x0 = a x + b out (Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D)."""
    root_alpha, root_beta = _array(alpha_bar**0.5), _array((1 - alpha_bar) ** 0.5)
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        if (root_alpha == 0).any():
            raise ValueError(
                "rescale_betas_zero_snr=True with prediction_type='epsilon' divides by zero at the first step: such "
                "models predict v or the sample"
            )
        return {"a": 1 / root_alpha, "b": -root_beta / root_alpha}
    if prediction == "sample":
        return {"a": 0 * root_alpha, "b": 0 * root_alpha + 1}
    return {"a": root_alpha, "b": -root_beta}


def _array(column: Any) -> Array:
    array: Array = column.to(torch.float64).numpy()
    return array
