"""CUDA graphs: the launches of a few steps are recorded once and replayed for the whole run."""

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.validate import line_of

WARMUPS = 3  # the first calls allocate, pick algorithms and compile kernels, none of which may be recorded


class CaptureError(RuntimeError):
    """An error of the recording; its message is the first reason that was given."""


def can_capture(device: torch.device) -> bool:
    """Return whether work on `device` can be recorded."""
    return device.type == "cuda"


class GraphPool:
    """A memory pool for the intermediate results of several graphs, of which one at a time is replayed.

    Nothing that outlives a replay may lie in the pool: a graph writes its results into buffers made outside.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self) -> Any:
        """Return torch's handle of the pool."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class StepGraph:
    """A CUDA graph of `body`.

    `body` must read and write fixed buffers only, and leave the host out. It runs WARMUPS times before it is recorded,
    on the stream that then records it, as capture demands.

    Raises:
        CaptureError: The recording failed. An error that `body` raises in the warm-up is passed on as it is.
        torch.OutOfMemoryError: Memory ran out in the warm-up or in the recording.
    """

    def __init__(self, body: Callable[[], Any], device: torch.device, pool: GraphPool | None = None) -> None:
        with torch.cuda.device(device):
            # A stream of our own: torch's default one belongs to whichever device captured first.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            handle = (pool or GraphPool()).handle()
            try:
                # The outer context restores the caller's stream even where the end of a broken capture raises.
                with (
                    torch.cuda.stream(side),
                    torch.cuda.graph(self._graph, pool=handle, stream=side, capture_error_mode="thread_local"),
                ):
                    body()
            except RuntimeError as error:
                cause = root_cause(error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise CaptureError(line_of(cause)) from error

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: the end of a capture that is already broken raises a second one on top."""
    while error.__context__ is not None:
        error = error.__context__
    return error
