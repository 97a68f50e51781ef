"""CUDA graphs: the launches of a few steps are recorded once and replayed for the whole run."""

import contextlib
import linecache
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.engine.device import global_generator
from ddpm_fast.validate import line_of

WARMUPS = 3  # the first calls allocate, pick algorithms and compile kernels, none of which may be recorded
# How the warnings begin that torch gives where the host waits, and where such warnings are switched on.
WAIT, PROTOTYPE = "called a synchronizing CUDA operation", "Synchronization debug mode is a prototype feature"
_TORCH, _OWN = str(Path(torch.__file__).parent), (__file__, warnings.__file__)

# Captures that broke: torch's allocators may still ask them whether a stream belongs to them.
_BROKEN: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """An error of the recording; its message is the first reason that was given."""


def can_capture(device: torch.device) -> bool:
    """Return whether work on `device` can be recorded."""
    return device.type == "cuda"


class GraphPool:
    """A memory pool for the intermediate results of several graphs, of which one at a time is replayed.

    A graph writes its results into buffers made outside. What lies in the pool holds until the next replay.

    Torch shares a pool only among graphs that were recorded on one stream, which the pool keeps.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._graphs: weakref.WeakSet[StepGraph] = weakref.WeakSet()

    def handle(self) -> Any:
        """Return torch's handle of the pool; torch refuses the handle of a pool whose graphs are all gone."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def stream(self) -> torch.cuda.Stream:
        """Return the stream to record on: torch's default one belongs to whichever device captured first."""
        device = torch.cuda.current_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        return self._streams[device]

    def add(self, graph: "StepGraph") -> None:
        """Note that the graph was recorded into the pool."""
        self._graphs.add(graph)


class StepGraph:
    """A CUDA graph of `body`. The graph owns the memory that it reads.

    `body` must read and write fixed buffers only, and leave the host out. It runs a few times before it is recorded,
    on the stream that then records it, as capture demands.

    A recording, a failed one as well, leaves torch's generators, its allocators and cuBLAS as they were.

    Args:
        body: The launches.
        device: Device of the launches.
        pool: Memory for intermediate results. None makes a pool for this graph alone.

    Attributes:
        output: What `body` returned in the recording: after a replay, before the next one, its tensors hold new values.

    Raises:
        CaptureError: The host waits for the GPU in `body`, or the recording failed. An error that `body` raises in the
            warm-up is passed on as it is.
        torch.OutOfMemoryError: Memory ran out in the warm-up or in the recording.
    """

    def __init__(self, body: Callable[[], Any], device: torch.device, pool: GraphPool | None = None) -> None:
        pool = pool or GraphPool()
        with torch.cuda.device(device), torch.random.fork_rng(devices=[]):
            side = pool.stream()
            with spare_state(global_generator(device)) as generator:
                offset = generator.get_offset()
                self._owned = [*_warm_up(body, side), *generated_code()]
                draws = generator.get_offset() != offset
                self._graph, self.output = _capture(body, side, pool.handle())
            pool.add(self)
            if draws:  # replays must draw from the caller's generator, so that the graph needs that one's state
                self._graph, self.output = _capture(body, side, pool.handle())

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()


@contextlib.contextmanager
def spare_state(generator: torch.Generator) -> Iterator[torch.Generator]:
    """Let a CUDA generator use a copy of its state inside the context.

    A capture that breaks leaves the state that the generator then has in capture mode for ever, so that every later
    draw raises an error (torch 2.8 to 2.11).
    """
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield generator
    finally:
        generator.graphsafe_set_state(own)


def generated_code() -> list[Any]:
    """Return the modules that Inductor has generated: they hold the constants of compiled functions."""
    cache = getattr(sys.modules.get("torch._inductor.codecache"), "PyCodeCache", None)
    return list(getattr(cache, "modules", []))


def memory_read(body: Callable[[], Any]) -> list[Any]:
    """Call `body` and return the storages that its operations read and have not made themselves.

    Compiled functions run as they were before compilation; they read the same.

    Raises:
        CaptureError: An operation cannot run while its arguments are looked at.
    """
    # Importing the compiler takes seconds; where nobody has imported it, nothing is compiled.
    compiler = sys.modules.get("torch._dynamo")
    plain = torch.compiler.set_stance("force_eager") if compiler is not None else contextlib.nullcontext()
    try:
        with plain, _Reads() as reads:
            body()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # in a call that succeeded before
        raise CaptureError(f"the memory that it reads cannot be listed: {line_of(error)}") from error
    return list(reads.found.values())


class _Reads(TorchDispatchMode):
    """A recorder of the storages that operations read without having made them, by address."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Any] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            address, storage = _memory(tensor)
            if address not in self._made:
                self.found.setdefault(address, storage)
        result = func(*args, **(kwargs or {}))
        self._made.update({_memory(tensor)[0] for tensor in _tensors(result)} - self.found.keys())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> tuple[int, Any]:
    """Return an address, and what keeps the memory there alive."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage
    except RuntimeError:  # a tensor subclass without memory of its own
        return -id(tensor), tensor


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """Collect the places in the code where the host waits for the GPU inside the context.

    Torch's mode "error" would stop other threads; its mode "warn" only makes them warn, which is not shown.
    """
    found: list[str] = []
    mode, thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def collect(message: Any, category: Any, file: str, line: int, stream: Any = None, code: Any = None) -> None:
            if not str(message).startswith((WAIT, PROTOTYPE)):
                show(message, category, file, line, stream, code)
            elif str(message).startswith(WAIT) and threading.get_ident() == thread:
                found.append(_place(file, line))

        warnings.showwarning = collect  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _place(file: str, line: int) -> str:
    """Return the code at a line, or where the line is torch's own, the code that called torch."""
    if file.startswith(_TORCH):
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((_TORCH, *_OWN))]
        file, line = (frames[-1].filename, frames[-1].lineno or 0) if frames else (file, line)
    return f"{Path(file).name}, line {line}: {linecache.getline(file, line).strip()}"


def _warm_up(body: Callable[[], Any], side: torch.cuda.Stream) -> list[Any]:
    """Run `body` on the stream until nothing is left to do once; return the memory that it reads.

    Raises:
        CaptureError: The host waits for the GPU.
    """
    owned = []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS - 1):
            body()
        with host_waits() as waits:
            body()
        if not waits:
            owned = memory_read(body)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if waits:
        raise CaptureError(f"the host waits for the GPU ({waits[0]})")
    return owned


def _capture(body: Callable[[], Any], side: torch.cuda.Stream, handle: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record `body` on the stream; return the graph, and what `body` returned. See `StepGraph`."""
    graph = torch.cuda.CUDAGraph()
    # The recording allocates cuBLAS' workspaces, in its pool: others are freed by whoever clears them, and then
    # unmapped, while the graph still writes there.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # The outer context restores the caller's stream even where the end of a broken capture raises.
        with (
            torch.cuda.stream(side),
            torch.cuda.graph(graph, pool=handle, stream=side, capture_error_mode="thread_local"),
        ):
            output = body()
    except RuntimeError as error:
        _abandon(graph, handle)
        cause = root_cause(error)
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise CaptureError(line_of(cause)) from error
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # or eager calls would write into the pool
    return graph, output


def _abandon(graph: torch.cuda.CUDAGraph, handle: Any) -> None:
    """Let the allocator forget a recording, which torch does only where the capture ends well."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, handle)
    except RuntimeError:  # the capture ended well: only `body` raised an error
        return
    torch._C._cuda_releasePool(device, handle)
    graph.reset()
    _BROKEN.append(graph)


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: the end of a capture that is already broken raises a second one on top."""
    while error.__context__ is not None:
        error = error.__context__
    return error
