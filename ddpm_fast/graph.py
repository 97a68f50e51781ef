"""CUDA graphs: record the launches of a few steps once, replay them for the whole walk."""

from collections.abc import Callable

import torch

WARMUPS = 3  # first calls allocate, pick algorithms and compile kernels: none of that may be recorded


def can_capture(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    return device.type == "cuda"


class StepGraph:
    """`body` recorded as one CUDA graph.

    `body` must read and write fixed buffers only and leave the host out of it. It runs WARMUPS times for real before
    it is recorded, on a stream of its own, as capture demands.
    """

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                body()

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()
