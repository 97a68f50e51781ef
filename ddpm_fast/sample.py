"""Sampling in one call: `from ddpm_fast.sample import sample, Sampler`."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine import Sampler, SampleResult
from ddpm_fast.network import Model

__all__ = ["SampleResult", "Sampler", "SamplerConfig", "sample"]

_CALL = tuple(name for name in inspect.signature(Sampler.__call__).parameters if name != "self")
F = TypeVar("F", bound=Callable[..., Any])


def _with_signature(*sources: Callable[..., Any]) -> Callable[[F], F]:
    """Let help() and editors see every keyword argument of `sources` and of SamplerConfig, not just **options."""

    def decorate(function: F) -> F:
        own = inspect.signature(function).parameters.values()
        found = {p.name: p for p in own if p.kind is not p.VAR_KEYWORD}
        for source in sources:
            for p in inspect.signature(source).parameters.values():
                if p.kind is p.KEYWORD_ONLY and p.name not in found:
                    found[p.name] = p
        for field in dataclasses.fields(SamplerConfig):
            found[field.name] = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
        function.__signature__ = inspect.Signature(list(found.values()))  # type: ignore[attr-defined]
        return function

    return decorate


@_with_signature(Sampler.__call__, Sampler.__init__)
def sample(model: Model, shape: Sequence[int], **options: Any) -> Any:
    """Draw x_0 ~ p(x_0) from a trained diffusion model: all ancestral steps, float32 of the given shape.

        images = sample(model, (16, 3, 32, 32), seeds=0)

    Args:
        model: any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B], that returns a tensor or
            an object with `.sample`.
        shape: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        options: what to draw with (`Sampler.__call__`: seeds, generator, x_T, output, output_steps, callback,
            progress), how to run (`Sampler`: model_kwargs, guidance_scale, uncond_kwargs, decode, device, dtype,
            execution, steps_per_replay, config), and which walk (`SamplerConfig`: num_inference_steps, sampler, eta,
            beta_schedule, prediction_type, variance_type, timestep_spacing, clip_sample, temperature, …).

    Returns:
        x_0, or a `SampleResult` where `output` is "x0" or "trajectory".

    Raises:
        ValueError, TypeError: in one sentence what does not fit, before the network is called.
        FloatingPointError: the model returned NaN or infinity; says at which step.
    """
    call = {name: options.pop(name) for name in _CALL if name in options and name not in _BOTH}
    return Sampler(model, shape, **options)(**call)


_BOTH = ("model_kwargs", "uncond_kwargs")  # the sampler is new: it is built with them
_with_signature()(Sampler.__init__)
