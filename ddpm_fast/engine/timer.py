"""A timer for calls, on the CPU and on CUDA."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.engine.graph import WARMUPS, CaptureError, StepGraph, can_capture


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes: the least of three; on CUDA within a graph where one can be recorded."""
    calls = 1
    if can_capture(device):
        calls = 10
        with contextlib.suppress(CaptureError):
            call = StepGraph(call, device).replay
    for _ in range(WARMUPS):
        call()
    durations = []
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        durations.append((time.perf_counter() - began) / calls)
    return min(durations)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
