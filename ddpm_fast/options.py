"""The keyword options of `Sampler`, `sample`, `accelerate` and `ddpm_fast.edit`, typed; and what they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from ddpm_fast.config import ConfigOptions, SamplerConfig
from ddpm_fast.engine.execution import Execution, ExecutionOptions
from ddpm_fast.speculation.choose import Speculate
from ddpm_fast.table import StepTable
from ddpm_fast.validate import check_names


class RunOptions(ExecutionOptions, ConfigOptions, total=False):
    """The options of which run to take, and of how to execute the run."""


class ModelOptions(RunOptions, total=False):
    """The run options, and the options of how the model is called."""

    model_kwargs: Mapping[str, Any] | None
    guidance_scale: float | Sequence[float] | None
    uncond_kwargs: Mapping[str, Any] | None
    shared_kwargs: Sequence[str]
    device: str | torch.device | None
    dtype: torch.dtype | None
    speculate: Speculate


class SamplerOptions(ModelOptions, total=False):
    """The keyword options of `Sampler` but `decode`."""

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
