"""Sampling in one call: `from ddpm_fast.sample import sample, Sampler`."""

import inspect
from collections.abc import Sequence
from typing import Any

from ddpm_fast.config import SamplerConfig, with_config_options
from ddpm_fast.engine import Sampler, SampleResult
from ddpm_fast.network import Model

__all__ = ["SampleResult", "Sampler", "SamplerConfig", "sample"]

# What goes to the call; all else builds the sampler, the conditioning included.
_CALL = set(inspect.signature(Sampler.__call__).parameters) - {"self", "model_kwargs", "uncond_kwargs"}


@with_config_options(Sampler.__call__, Sampler.__init__)
def sample(model: Model, shape: Sequence[int], **options: Any) -> Any:
    """Draw x_0 ~ p(x_0) from a trained diffusion model: all ancestral steps, float32 of the given shape.

        images = sample(model, (16, 3, 32, 32), seeds=0)

    Args:
        model: any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B], that returns a tensor or
            an object with `.sample`.
        shape: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        options: what to draw with (`Sampler.__call__`: seeds, generator, x_T, known, mask, output, output_steps,
            callback, progress), how to run (`Sampler`: model_kwargs, guidance_scale, uncond_kwargs, decode, device,
            dtype, speculate, config, table; `Execution`: execution, steps_per_replay, backend, optimize, memory_format,
            compile, tf32), and which walk (`SamplerConfig`: num_inference_steps, sampler, eta, beta_schedule,
            prediction_type, variance_type, timestep_spacing, clip_sample, temperature, …).

    Returns:
        x_0, or a `SampleResult` where `output` is "result", "x0" or "trajectory".

    Raises:
        ValueError, TypeError: in one sentence what does not fit, before the network is called.
        FloatingPointError: the model returned NaN, or an infinity that no clipping bounds; says at which step.
    """
    call = {name: options.pop(name) for name in _CALL if name in options}
    return Sampler(model, shape, **options)(**call)
