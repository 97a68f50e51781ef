"""CUDA graphs: record the launches of a few steps once, replay them for the whole walk."""

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.validate import line_of

WARMUPS = 3  # first calls allocate, pick algorithms and compile kernels: none of that may be recorded


class CaptureError(RuntimeError):
    """The work cannot be recorded; the message is the first reason that was given."""


def can_capture(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    return device.type == "cuda"


class GraphPool:
    """Memory for the intermediate results of several graphs, of which one at a time is replayed.

    Nothing that outlives a replay may lie in it: what a graph leaves behind it writes into buffers made outside.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self) -> Any:
        """What torch knows the pool by."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class StepGraph:
    """`body` recorded as one CUDA graph.

    `body` must read and write fixed buffers only and leave the host out of it. It runs WARMUPS times for real before
    it is recorded, on the stream that then records it, as capture demands.

    Raises:
        CaptureError: the recording failed. What `body` itself raises in the warm-up comes through as it is.
        torch.OutOfMemoryError: in the warm-up or in the recording.
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
                # The outer context brings the caller's stream back even where the end of a broken capture raises.
                with (
                    torch.cuda.stream(side),
                    torch.cuda.graph(self._graph, pool=handle, stream=side, capture_error_mode="thread_local"),
                ):
                    body()
            except RuntimeError as error:
                first = _first(error)
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                raise CaptureError(line_of(first)) from error

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a capture that is already broken raises once more on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
