"""How a sampling loop is executed. No option changes which samples are drawn, up to the rounding of the network."""

from dataclasses import dataclass
from typing import TypedDict

from ddpm_fast.validate import one_of, whole

EXECUTIONS = ("auto", "graph", "eager")
OPTIMIZATIONS = ("auto", "hoist", "fuse", None)
MEMORY_FORMATS = (None, "contiguous", "channels_last", "auto")


class ExecutionOptions(TypedDict, total=False):
    """The fields of `Execution` as keyword options, for type checkers."""

    execution: str
    steps_per_replay: int
    backend: str | None
    optimize: str | None
    memory_format: str | None
    compile: bool
    tf32: bool | None
    verify: bool


@dataclass(frozen=True)
class Execution:
    """The execution options of a sampling loop.

    Attributes:
        execution: "graph" replays a CUDA graph of network and step. "eager" calls both one by one. "auto" takes the
            graph on CUDA where the network allows it.
        steps_per_replay: Number of steps in one graph.
        backend: "triton" or "torch" kernels; None chooses by device.
        optimize: "hoist" takes out of the loop what in the network does not depend on x (`ddpm_fast.engine.hoist`),
            which takes seconds. "fuse" also makes one operation of every convolution or linear layer and what stands
            around it (`ddpm_fast.engine.fuse`). "auto" hoists once the runs have taken about as long as hoisting will.
            None never hoists.
        memory_format: Memory format of the network's input and, where the network is hoisted, of its convolutions'
            weights. "contiguous" or "channels_last"; "auto" takes the faster one after a short trial, whose result is
            remembered on disk (`ddpm_fast.engine.choices`). None leaves the input contiguous and the weights as they
            are.
        compile: Whether the network runs through torch.compile (Inductor), hoisted first unless `optimize` is None.
            Compiling a large network takes minutes.
        tf32: Whether float32 products of the network may be taken in TensorFloat-32 on a GPU (10 bits of mantissa).
            None leaves torch's own setting; a graph keeps the setting that it was recorded with.
        verify: Whether every run of a network that is hoisted, compiled or recorded begins with one call that is
            compared with the model's own, which takes as long as two steps. Where they differ, the network is prepared
            anew, or else runs as the model is, and the log says so. With speculation also whether several drafts in
            one call get the outputs of calls of their own, once for each number of drafts.

    Raises:
        ValueError: An option has a value that is not listed here.
    """

    execution: str = "auto"
    steps_per_replay: int = 1
    backend: str | None = None
    optimize: str | None = "auto"
    memory_format: str | None = None
    compile: bool = False
    tf32: bool | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        one_of("execution", self.execution, EXECUTIONS)
        whole("steps_per_replay", self.steps_per_replay, 1)
        one_of("backend", self.backend, (None, "torch", "triton"))
        one_of("optimize", self.optimize, OPTIMIZATIONS)
        one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        one_of("compile", self.compile, (False, True))
        one_of("tf32", self.tf32, (None, False, True))
        one_of("verify", self.verify, (False, True))

    @property
    def at_once(self) -> bool:
        """Whether the network is prepared when the loop is built, not only once that pays."""
        return self.optimize in ("hoist", "fuse") or self.compile or self.memory_format is not None


DEFAULT = Execution()
