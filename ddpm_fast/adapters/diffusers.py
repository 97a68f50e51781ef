"""diffusers: pipelines whose sampling loop is ours, and schedulers for every other pipeline."""

import copy
import functools
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

from ddpm_fast.adapters import unsupported
from ddpm_fast.adapters.diffusers_pipelines import (
    FastDDIMPipeline,
    FastDDPMPipeline,
    FastDiTPipeline,
    FastLDMPipeline,
    is_supported,
)
from ddpm_fast.adapters.diffusers_schedulers import FastDDIMScheduler, FastDDPMScheduler
from ddpm_fast.adapters.diffusers_tables import check_config
from ddpm_fast.adapters.runner import Options, Runner, adopt

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
    """Return the fast pipeline or scheduler for `obj`; see `ddpm_fast.accelerate`."""
    for stock, fast in _SCHEDULERS.items():
        if isinstance(obj, stock):
            if options.speculate is not False:
                raise ValueError("a scheduler takes one step at a time: speculate is for pipelines")
            _refuse_override(obj, stock, fast, "step")
            check_config(obj)
            return adopt(
                copy.deepcopy(obj), _over(fast, obj.__class__), _backend=options.execution.backend, _cached=None
            )
    for stock, fast in _PIPELINES.items():
        if isinstance(obj, stock):
            _refuse_override(obj, stock, fast, "__call__")
            if is_supported(obj.scheduler):
                check_config(obj.scheduler)
            pipeline: Any = adopt(obj, _over(fast, obj.__class__), _runner=Runner(options))
            pipeline.scheduler = copy.deepcopy(obj.scheduler)  # every call sets its timesteps
            return pipeline
    hint = "it is neither a pipeline nor a scheduler that is known"
    if isinstance(obj, DiffusionPipeline):
        hint = "of any other pipeline the scheduler can be accelerated: pipe.scheduler = accelerate(pipe.scheduler)"
    raise TypeError(unsupported(obj, hint))


def _refuse_override(obj: Any, stock: type, fast: type, method: str) -> None:
    """Raise TypeError for a subclass whose own `method` would be lost."""
    if getattr(type(obj), method) not in (getattr(stock, method), getattr(fast, method)):
        raise TypeError(f"{type(obj).__name__} has a {method} of its own, which would be lost: not accelerated")


@functools.cache
def _over(fast: Any, kind: Any) -> Any:
    """Return `fast`, or a class of `fast` in front of the user's subclass."""
    if issubclass(kind, fast):
        return kind
    if kind in fast.__mro__:
        return fast
    return type(f"Fast{kind.__name__}", (fast, kind), {"__module__": fast.__module__, "__reduce_ex__": _reduce})


def _reduce(obj: Any, protocol: Any) -> tuple[Any, ...]:
    """Return what copies and pickles are made from: no module holds the class, which is made anew."""
    return _blank, type(obj).__bases__, obj.__dict__


def _blank(fast: Any, kind: Any) -> Any:
    made = _over(fast, kind)
    return made.__new__(made)
