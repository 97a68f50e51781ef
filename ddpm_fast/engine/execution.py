"""How a walk is executed. None of it changes which samples are drawn, up to the rounding of the network."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_fast.validate import one_of, whole

EXECUTIONS = ("auto", "graph", "eager")
OPTIMIZATIONS = ("auto", "hoist", None)
MEMORY_FORMATS = (None, "contiguous", "channels_last", "auto")


@dataclass(frozen=True)
class Execution:
    """How a walk is executed.

    Attributes:
        execution: "graph" replays a CUDA graph of network + step; "eager" calls them one by one; "auto" takes the
            graph on CUDA where the network allows it.
        steps_per_replay: steps in one graph.
        backend: "triton" or "torch" kernels; None chooses by device.
        optimize: "hoist" takes out of the loop what in the network does not depend on x (`ddpm_fast.engine.hoist`),
            which takes seconds; "auto" does so once enough steps were walked for that to pay; None never does.
        memory_format: of the network's input, and where it is hoisted of its convolutions' weights: "contiguous";
            "channels_last"; "auto", whichever is faster in a short trial that is remembered as long as the network
            lives; None: the input is contiguous, and the weights are as they are.
        compile: run the network through torch.compile (Inductor), hoisted first unless optimize is None. Takes minutes
            with a large network.
        tf32: whether float32 products of the network may be taken in TensorFloat-32 (a GPU's; 10 bits of mantissa);
            None leaves it to what torch is set to.
    """

    execution: str = "auto"
    steps_per_replay: int = 1
    backend: str | None = None
    optimize: str | None = "auto"
    memory_format: str | None = None
    compile: bool = False
    tf32: bool | None = None

    def __post_init__(self) -> None:
        one_of("execution", self.execution, EXECUTIONS)
        whole("steps_per_replay", self.steps_per_replay, 1)
        one_of("backend", self.backend, (None, "torch", "triton"))
        one_of("optimize", self.optimize, OPTIMIZATIONS)
        one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        one_of("compile", self.compile, (False, True))
        one_of("tf32", self.tf32, (None, False, True))

    @property
    def at_once(self) -> bool:
        """Whether the network is prepared when the loop is built, not when that pays."""
        return self.optimize == "hoist" or self.compile or self.memory_format is not None


DEFAULT = Execution()


@contextlib.contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Float32 products in TensorFloat-32 on CUDA, or not, inside; None changes nothing."""
    if allowed is None:
        yield
        return
    places: tuple[Any, ...]
    value: Any
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and newer
        places = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
    else:
        places = torch.backends.cuda.matmul, torch.backends.cudnn
        name, value = "allow_tf32", allowed
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            setattr(place, name, was)
