"""An arm in a process of its own: it is built there at once and runs there when its turn has come."""

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import Row
from benchmarks.walks.arms import ALONE, ARMS, Arm, Ours, WrongStepError, check, quiet
from benchmarks.walks.networks import KINDS, Problem
from benchmarks.walks.parts import Part
from ddpm_fast.engine.tf32 import tf32

Seconds = tuple[float, float]  # of one run: until the images are on the host; until the host had issued all steps
ENDS = 5  # seconds that a process which closed its pipe gets to end


class ArmError(Exception):
    """An arm cannot be built, takes a wrong step, or fails while it runs."""


class Worker:
    """A process that builds an arm and then runs it when it is asked to.

    Args:
        part: The setting.
        arm: A key of `ARMS`.
        device: The device of the network.

    Attributes:
        row: What the build measured, or why it failed; None until the build has ended.
    """

    def __init__(self, part: Part, arm: str, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self.arm = arm
        self.row: Row | None = None
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, part, arm, str(device)))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of what this pipe gives

    def time(self, seed: int) -> Seconds:
        """Run the arm once and return how long that took.

        Raises:
            ArmError: The run failed, or the process has ended.
        """
        try:
            self._pipe.send(seed)
        except OSError as error:
            raise ArmError(f"its process has ended: {error}") from None
        seconds: Seconds = self._answer()
        return seconds

    def receive_row(self) -> None:
        """Wait for the end of the build."""
        try:
            self.row = self._answer()
        except ArmError as error:
            self.row = {"arm": self.arm, "error": str(error)}

    def end(self) -> None:
        """Tell the process to end, without waiting for its end."""
        self._pipe.close()
        self._process.kill()

    def join(self) -> None:
        """Wait for the end of the process."""
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(ENDS)
            raise ArmError(f"its process ended with code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise ArmError(answer)
        return answer


def rows_as_they_come(workers: Sequence[Worker], until: float, after: Callable[[Worker], None]) -> None:
    """Wait for the builds of all workers until a time; `after` gets each worker whose build has ended."""
    waiting: dict[Any, Worker] = {worker._pipe: worker for worker in workers if worker.row is None}
    while waiting and (ready := wait(list(waiting), max(0.0, until - time.perf_counter()))):
        for pipe in ready:
            worker = waiting.pop(pipe)
            worker.receive_row()
            after(worker)


def serve(pipe: Connection, part: Part, name: str, device: str) -> None:
    """Build an arm, send its row, and run the arm for every seed that comes; send a text where something fails."""
    try:
        try:
            _serve(pipe, part, name, Clock(torch.device(device)))
        except WrongStepError as error:
            pipe.send(f"wrong result: {error}")
        except Exception as error:  # the other arms are still measured
            pipe.send(f"{type(error).__name__}: {str(error)[:500]}")
    except OSError:  # nobody listens any more
        return


def _serve(pipe: Connection, part: Part, name: str, clock: "Clock") -> None:
    with tf32({"float32": False, "tf32": True}.get(part.precision) if clock.cuda else None):
        arm, row = build(name, Problem(KINDS[part.kind], part.batch, part.precision, part.steps, clock.device), clock)
        pipe.send(row)
        with contextlib.suppress(EOFError):  # nobody asks any more
            while True:
                pipe.send(clock.time(arm, pipe.recv()))


class Clock:
    """A wall clock for a device.

    Attributes:
        device: The device that runs the arms.
        cuda: Whether the host has to wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device

    def wait(self) -> float:
        """Wait until the device has finished. Return the time."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, arm: Arm, seed: int) -> Seconds:
        """Return the seconds until the images are on the host as bytes, and until the host had issued all steps."""
        began = self.wait()
        x = arm.sample(seed)
        issued = time.perf_counter()
        if x is not None:
            to_bytes(x).cpu()
        return self.wait() - began, issued - began


def to_bytes(x: Tensor) -> Tensor:
    """Return images on [-1, 1] as bytes. All arms use this function."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def build(name: str, problem: Problem, clock: Clock) -> tuple[Arm, Row]:
    """Build an arm and check it. Return the arm, and a row with the time, the memory and the kernels that it takes."""
    reserved = _reserved(clock)
    began = clock.wait()
    with quiet():
        arm = ARMS[name](problem)
    seconds = clock.wait() - began
    row: Row = {"arm": name, "build_s": seconds, "gate": None if name == ALONE else check(arm)}
    row["kernels_per_step"] = kernels(arm, clock) if clock.cuda else None
    arm.sample(0)
    row["memory_MB"] = (_reserved(clock) - reserved) / 1e6 if clock.cuda else None
    return arm, row


def _reserved(clock: Clock) -> int:
    if not clock.cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(clock.device)


def kernels(arm: Arm, clock: Clock) -> float | None:
    """Return the kernels, copies and fills that the device runs for a step; None where they cannot be counted."""
    if isinstance(arm, Ours):
        graphs = list(arm.loop._graphs.values())
        return count(graphs[0].replay, clock) if graphs else None
    if arm.problem.steps < 8:
        return None
    return (count(lambda: arm.sample(0, 7), clock) - count(lambda: arm.sample(0, 3), clock)) / 4


def count(work: Callable[[], Any], clock: Clock) -> float:
    """Return the kernels, copies and fills that the device runs for `work`."""
    from torch.profiler import ProfilerActivity, profile

    clock.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        clock.wait()
    return float(sum(event.device_type.name == "CUDA" for event in profiled.events()))
