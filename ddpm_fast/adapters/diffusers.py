"""diffusers: pipelines whose whole walk is ours, and schedulers for every other pipeline."""

import copy
from typing import Any

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    LDMPipeline,
)

from ddpm_fast.adapters import unknown
from ddpm_fast.adapters.diffusers_pipelines import (
    FastDDIMPipeline,
    FastDDPMPipeline,
    FastDiTPipeline,
    FastLDMPipeline,
    is_supported,
)
from ddpm_fast.adapters.diffusers_schedulers import FastDDIMScheduler, FastDDPMScheduler
from ddpm_fast.adapters.diffusers_tables import check_config
from ddpm_fast.adapters.walk import Options, Walker, adopt

__all__ = [
    "FastDDIMPipeline",
    "FastDDIMScheduler",
    "FastDDPMPipeline",
    "FastDDPMScheduler",
    "FastDiTPipeline",
    "FastLDMPipeline",
    "accelerate",
]

_PIPELINES = {
    DDPMPipeline: FastDDPMPipeline,
    DDIMPipeline: FastDDIMPipeline,
    DiTPipeline: FastDiTPipeline,
    LDMPipeline: FastLDMPipeline,
}
_SCHEDULERS = {DDPMScheduler: FastDDPMScheduler, DDIMScheduler: FastDDIMScheduler}


def accelerate(obj: Any, options: Options) -> Any:
    """The fast pipeline or scheduler for `obj`; see `ddpm_fast.accelerate`."""
    for stock, fast in _SCHEDULERS.items():
        if isinstance(obj, stock):
            if options.speculate is not False:
                raise ValueError("a scheduler takes one step at a time: speculate is for pipelines")
            _refuse_override(obj, stock, fast, "step")
            check_config(obj)
            return adopt(copy.deepcopy(obj), _over(fast, obj), _backend=options.how.backend, _cached=None)
    for stock, fast in _PIPELINES.items():
        if isinstance(obj, stock):
            _refuse_override(obj, stock, fast, "__call__")
            if is_supported(obj.scheduler):
                check_config(obj.scheduler)
            pipeline: Any = adopt(obj, _over(fast, obj), _walker=Walker(options))
            pipeline.scheduler = copy.deepcopy(obj.scheduler)  # its timesteps are set by every call
            return pipeline
    hint = "it is neither a pipeline nor a scheduler that is known"
    if isinstance(obj, DiffusionPipeline):
        hint = "of any other pipeline the scheduler can be accelerated: pipe.scheduler = accelerate(pipe.scheduler)"
    raise TypeError(unknown(obj, hint))


def _refuse_override(obj: Any, stock: type, fast: type, method: str) -> None:
    if getattr(type(obj), method) not in (getattr(stock, method), getattr(fast, method)):
        raise TypeError(f"{type(obj).__name__} has a {method} of its own, which would be lost: not accelerated")


def _over(fast: type, obj: Any) -> type:
    """`fast` itself, or in front of the user's subclass of what it accelerates."""
    kind = type(obj)
    if issubclass(kind, fast):
        return kind
    return fast if kind in fast.__mro__ else type(f"Fast{kind.__name__}", (fast, kind), {"__module__": fast.__module__})
