"""How long a call takes."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.engine.graph import WARMUPS, CaptureError, StepGraph, can_capture


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes: the least of a few, on CUDA inside a graph if it can be recorded."""
    calls = 1
    if can_capture(device):
        calls = 10
        with contextlib.suppress(CaptureError):
            call = StepGraph(call, device).replay
    for _ in range(WARMUPS):
        call()
    times = []
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
