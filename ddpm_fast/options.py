"""The keyword options of `sample`, `Sampler` and `accelerate`, by what they build; for type checkers and for help()."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

import torch

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.execution import Execution
from ddpm_fast.speculation.choose import Speculate
from ddpm_fast.table import StepTable
from ddpm_fast.validate import check_names

F = TypeVar("F", bound=Callable[..., Any])


class ExecutionOptions(TypedDict, total=False):
    """The fields of `Execution`."""

    execution: str
    steps_per_replay: int
    backend: str | None
    optimize: str | None
    memory_format: str | None
    compile: bool
    tf32: bool | None


class ConfigOptions(TypedDict, total=False):
    """The fields of `SamplerConfig`."""

    num_inference_steps: int | None
    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    trained_betas: Sequence[float] | None
    rescale_betas_zero_snr: bool
    prediction_type: str
    variance_type: str
    sampler: str
    eta: float
    ddim_direction: str
    set_alpha_to_one: bool
    timestep_spacing: str
    steps_offset: int
    timesteps: Sequence[int] | None
    previous_timestep: str
    noise_free: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    temperature: float


class RunOptions(ExecutionOptions, ConfigOptions, total=False):
    """The options of which run to take, and of how to execute it."""


class SamplerOptions(RunOptions, total=False):
    """The keyword options of `Sampler` but `decode`."""

    model_kwargs: Mapping[str, Any] | None
    guidance_scale: float | Sequence[float] | None
    uncond_kwargs: Mapping[str, Any] | None
    device: str | torch.device | None
    dtype: torch.dtype | None
    speculate: Speculate
    config: SamplerConfig | None
    table: StepTable | None


_CONFIG = frozenset(ConfigOptions.__annotations__)
_EXECUTION = frozenset(ExecutionOptions.__annotations__)


def split_options(options: RunOptions, config: SamplerConfig | None = None) -> tuple[SamplerConfig, Execution]:
    """Return the config and the execution that the options describe, on top of `config`.

    Raises:
        TypeError: An option has an unknown name; the message lists the names that there are.
        ValueError: An option has a value that is not allowed.
    """
    check_names("option", options, _CONFIG | _EXECUTION)
    given = cast("Mapping[str, Any]", options)
    execution = Execution(**{name: value for name, value in given.items() if name in _EXECUTION})
    return SamplerConfig.from_options({n: v for n, v in given.items() if n in _CONFIG}, config), execution


def execution_of(options: ExecutionOptions) -> Execution:
    """Return the execution that the options describe.

    Raises:
        TypeError: An option has an unknown name; the message lists the names that there are.
        ValueError: An option has a value that is not allowed.
    """
    check_names("option", options, _EXECUTION)
    return Execution(**options)


def listed(*sources: Callable[..., Any]) -> Callable[[F], F]:
    """Let help() list every option of a function, instead of `**options`: the keywords of `sources` with defaults."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
        for source in sources:
            if dataclasses.is_dataclass(source):
                fields = [(f.name, f.default, f.type) for f in dataclasses.fields(source)]
            else:
                found = inspect.signature(source).parameters.values()
                fields = [(p.name, p.default, p.annotation) for p in found if p.kind is p.KEYWORD_ONLY]
            for name, default, annotation in fields:
                kind = inspect.Parameter.KEYWORD_ONLY
                keyword = inspect.Parameter(name, kind, default=default, annotation=annotation)
                parameters.setdefault(name, keyword)
        function.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        return function

    return decorate
