"""CUDA graphs: record the launches of a few steps once, replay them for the whole walk."""

from collections.abc import Callable

import torch

WARMUPS = 3  # first calls allocate, pick algorithms and compile kernels: none of that may be recorded


class CaptureError(RuntimeError):
    """The work cannot be recorded; the message is the first reason that was given."""


def can_capture(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    return device.type == "cuda"


class StepGraph:
    """`body` recorded as one CUDA graph.

    `body` must read and write fixed buffers only and leave the host out of it. It runs WARMUPS times for real before
    it is recorded, on the stream that then records it, as capture demands.

    Raises:
        CaptureError: the recording failed. What `body` itself raises in the warm-up comes through as it is.
    """

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
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
            try:
                # The outer context brings the caller's stream back even where the end of a broken capture raises.
                with (
                    torch.cuda.stream(side),
                    torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"),
                ):
                    body()
            except RuntimeError as error:
                raise CaptureError(_first_reason(error)) from error

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()


def _first_reason(error: BaseException) -> str:
    """What went wrong first: ending a capture that is already broken raises once more on top of it."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)
