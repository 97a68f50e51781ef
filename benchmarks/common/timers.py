"""Timers for a GPU and, to try a benchmark without one, for a CPU. They report medians with percentiles."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.results import Row
from ddpm_fast.engine.graph import CaptureError, StepGraph

Launch = Callable[[], Any]

WARMUPS = 3
FEWEST, MOST = 10, 200  # repetitions of one measurement


@dataclass(frozen=True)
class Timing:
    """The median and two percentiles of several repetitions, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float
    repetitions: int


def summary(microseconds: Sequence[float]) -> Timing:
    """Return the median and the percentiles 20 and 80, interpolated linearly."""
    p20, median, p80 = np.percentile(microseconds, (20, 50, 80)).tolist()
    return Timing(median, p20, p80, len(microseconds))


def repetitions_in(seconds: float, each: float) -> int:
    """Return how often to repeat something that takes `each` seconds in order to fill `seconds`."""
    return min(MOST, max(FEWEST, int(seconds / max(each, 1e-9))))


class CudaTimer:
    """A timer that measures launches on the current CUDA device with events.

    Attributes:
        cold_bytes: The bytes that are written and read to empty the L2 cache: four times its size, at least 128 MB.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.cold_bytes = max(4 * size, 128 << 20)
        self._flush = torch.empty(self.cold_bytes // 4, device=device)
        self._sum = torch.empty((), device=device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def cold(self, launch: Launch, seconds: float = 0.25) -> Timing:
        """Time one launch between two events, on a cold L2 cache.

        The cache is flushed before each launch, outside of the timed interval. The flush writes a buffer and then
        reads it, so the lines that the launch evicts are clean, and its interval contains no writes but its own. The
        flush also keeps the GPU busy while the host queues the launch. Where queueing takes longer than the flush
        (several kernels on a small state), the host's time is part of the result, as it is in a sampling loop.
        """
        for _ in range(WARMUPS):
            launch()
        began = time.perf_counter()
        self._durations(launch, WARMUPS)
        count = repetitions_in(seconds, (time.perf_counter() - began) / WARMUPS)
        return summary(self._durations(launch, count))

    def graphed(self, launches: Sequence[Launch], seconds: float = 0.25) -> Timing | None:
        """Time one launch inside a CUDA graph of all launches, which hides the host's time of a launch.

        The launches should use different buffers that are larger than the cache together. Returns None where the
        launches cannot be captured.
        """

        def body() -> None:
            for launch in launches:
                launch()

        try:
            graph = StepGraph(body, self.device)
        except CaptureError:
            return None
        graph.replay()
        began = time.perf_counter()
        self._durations(graph.replay, WARMUPS, flush=False)
        count = repetitions_in(seconds, (time.perf_counter() - began) / WARMUPS)
        return summary([t / len(launches) for t in self._durations(graph.replay, count, flush=False)])

    def _durations(self, launch: Launch, count: int, flush: bool = True) -> list[float]:
        """Return the microseconds of each of `count` launches."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            if flush:
                self._flush.zero_()
                torch.sum(self._flush, dim=0, out=self._sum)
            start.record()
            launch()
            end.record()
        self.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


class WallTimer:
    """A timer with the methods of `CudaTimer` for a CPU. It uses the wall clock and does not empty any cache.

    It serves to try the pieces of a benchmark; its numbers mean nothing.
    """

    cold_bytes = 1 << 16

    def synchronize(self) -> None:
        pass

    def cold(self, launch: Launch, seconds: float = 0.0) -> Timing:
        launch()
        durations = []
        for _ in range(repetitions_in(seconds, 1.0)):
            began = time.perf_counter()
            launch()
            durations.append(1e6 * (time.perf_counter() - began))
        return summary(durations)

    def graphed(self, launches: Sequence[Launch], seconds: float = 0.0) -> Timing | None:
        for launch in launches:
            launch()
        return None


Timer = CudaTimer | WallTimer


def copy_bandwidth(timer: Timer, sizes: Sequence[int], device: torch.device, free: Callable[[], int]) -> Row:
    """Return the best rate of `y.copy_(x)` in float32 over buffers of `sizes` bytes.

    Bytes that are read and bytes that are written both count. Buffers that exceed `free()` bytes are left out.
    """
    rows: list[Row] = []
    left_out: list[Row] = []
    for size in sizes:
        if 2 * size > free():
            left_out.append({"buffer_bytes": size, "reason": "memory"})
            continue
        x = torch.randn(size // 4, device=device)
        y = torch.empty_like(x)

        def copy(x: Tensor = x, y: Tensor = y) -> Tensor:
            return y.copy_(x)

        timing = timer.cold(copy)
        rows.append({"buffer_bytes": size, "GB_per_s": 2e-3 * size / timing.median_us, **vars(timing)})
    best = max((row["GB_per_s"] for row in rows), default=None)
    if best is None:
        raise RuntimeError("no copy fits into the free memory: there is nothing to compare with")
    return {"GB_per_s": best, "rows": rows, "left_out": left_out}


def host_times(
    timer: Timer, functions: dict[str, Launch], launches: int = 500, rounds: int = 11
) -> dict[str, dict[str, float]]:
    """Return the host's microseconds for one launch of each function.

    Each round issues `launches` launches and then synchronizes once. Only `whole_us` includes the synchronization. If
    `whole_us` is hardly more than the median, the device kept up. Keep `launches` below about a thousand: where the
    queue is full, a launch waits for the device. The functions take turns, so a host that slows down slows all of them.
    """
    issued: dict[str, list[float]] = {name: [] for name in functions}
    finished: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            timer.synchronize()
            began = time.perf_counter()
            for _ in range(launches):
                function()
            queued = time.perf_counter()
            timer.synchronize()
            if round_ > 0:  # the first round compiles and warms up
                issued[name].append(1e6 * (queued - began) / launches)
                finished[name].append(1e6 * (time.perf_counter() - began) / launches)
    return {name: {**vars(summary(issued[name])), "whole_us": float(np.median(finished[name]))} for name in functions}
