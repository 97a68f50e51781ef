"""Timing on a GPU, and its stand-in for a CPU: medians with percentiles, cold caches, the host's own time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddpm_fast.engine.graph import CaptureError, StepGraph

Launch = Callable[[], Any]

WARMUPS = 3
FEWEST, MOST = 10, 200  # repetitions of one measurement


@dataclass(frozen=True)
class Timing:
    """Times of repetitions, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float
    repetitions: int


def summary(times_us: Sequence[float]) -> Timing:
    """Median and the percentiles 20 and 80, interpolated linearly."""
    p20, median, p80 = np.percentile(times_us, (20, 50, 80)).tolist()
    return Timing(median, p20, p80, len(times_us))


def repetitions_in(seconds: float, each: float) -> int:
    """How often something that takes `each` seconds is repeated in `seconds`."""
    return min(MOST, max(FEWEST, int(seconds / max(each, 1e-9))))


class CudaTimer:
    """Times launches on the current CUDA device with events.

    Attributes:
        cold_bytes: what is written, and read, to empty the L2 cache; four times its size and at least 128 MB.
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
        """One launch between two events, on a cold L2 cache.

        The cache is flushed before each, outside of the timed interval: written, then read, so that what the launch
        evicts is clean and its own interval pays for no write but its own. The flush also keeps the GPU busy while
        the host queues the launch; where the host takes longer than that (several kernels on a small state), its
        time is part of the result, as it is of a loop's.
        """
        for _ in range(WARMUPS):
            launch()
        began = time.perf_counter()
        self._timed(launch, WARMUPS)
        count = repetitions_in(seconds, (time.perf_counter() - began) / WARMUPS)
        return summary(self._timed(launch, count))

    def graphed(self, launches: Sequence[Launch], seconds: float = 0.25) -> Timing | None:
        """Time a launch inside a CUDA graph of them all, which hides what a launch costs the host.

        None where they cannot be captured. Give launches on different buffers, together larger than the cache.
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
        self._timed(graph.replay, WARMUPS, flush=False)
        count = repetitions_in(seconds, (time.perf_counter() - began) / WARMUPS)
        return summary([t / len(launches) for t in self._timed(graph.replay, count, flush=False)])

    def _timed(self, launch: Launch, count: int, flush: bool = True) -> list[float]:
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
    """The same on a CPU, by the wall clock and with whatever the caches hold: to try the pieces, not to measure."""

    cold_bytes = 1 << 16

    def synchronize(self) -> None:
        pass

    def cold(self, launch: Launch, seconds: float = 0.0) -> Timing:
        launch()
        times = []
        for _ in range(repetitions_in(seconds, 1.0)):
            began = time.perf_counter()
            launch()
            times.append(1e6 * (time.perf_counter() - began))
        return summary(times)

    def graphed(self, launches: Sequence[Launch], seconds: float = 0.0) -> Timing | None:
        for launch in launches:
            launch()
        return None


Timer = CudaTimer | WallTimer


def copy_bandwidth(timer: Timer, sizes: Sequence[int], device: torch.device, free: Callable[[], int]) -> dict:
    """The best rate of `y.copy_(x)`, float32, over buffers of `sizes` bytes; bytes read and written both count."""
    rows, left_out = [], []
    for size in sizes:
        if 2 * size > free():
            left_out.append({"buffer_bytes": size, "reason": "memory"})
            continue
        x = torch.randn(size // 4, device=device)
        y = torch.empty_like(x)
        timing = timer.cold(lambda x=x, y=y: y.copy_(x))
        rows.append({"buffer_bytes": size, "GB_per_s": 2e-3 * size / timing.median_us, **vars(timing)})
    best = max((row["GB_per_s"] for row in rows), default=None)
    if best is None:
        raise RuntimeError("no copy fits into the free memory: there is nothing to compare with")
    return {"GB_per_s": best, "rows": rows, "left_out": left_out}


def host_times(
    timer: Timer, functions: dict[str, Launch], launches: int = 500, rounds: int = 11
) -> dict[str, dict[str, float]]:
    """Host microseconds a launch: many launches, then one synchronize, which only `whole_us` has in it.

    The functions take turns, so that a host that slows down slows all of them. Keep `launches` below a thousand or so:
    where the queue is full a launch waits for the device. If `whole_us` is hardly more than the median, the device
    kept up.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    wholes: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            timer.synchronize()
            began = time.perf_counter()
            for _ in range(launches):
                function()
            queued = time.perf_counter()
            timer.synchronize()
            if round_ > 0:  # the first one compiles and warms up
                times[name].append(1e6 * (queued - began) / launches)
                wholes[name].append(1e6 * (time.perf_counter() - began) / launches)
    return {name: {**vars(summary(times[name])), "whole_us": float(np.median(wholes[name]))} for name in functions}
