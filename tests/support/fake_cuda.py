"""A stand-in for CUDA graphs on the CPU, with the state that torch and its allocator keep around them.

A graph is what torch dispatched once, run again on the very memory of the first time. Unlike calling the function again
this shows mistakes with static buffers: what rebinds a tensor instead of writing into it, what the host decided from a
value, and memory that the graph reads although nobody holds it any more.

The state follows torch's source (CUDAGraph.cpp, CUDAGeneratorImpl.cpp, CUDACachingAllocator.cpp, CublasHandlePool.cpp):
a capture that breaks leaves the generator's state in capture mode and the allocator recording into the pool.
"""

import contextlib
import itertools
import traceback
import warnings
import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast.engine.graph
from ddpm_fast.engine.graph import WAIT

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)  # what cuBLAS takes a workspace for
LAUNCH_FAILURE = "CUDA error: unspecified launch failure"


class FakeCuda:
    """What `torch.cuda` is for ddpm_fast.engine.graph.

    Attributes:
        made, replays: Numbers of graphs that were recorded, and of replays.
        recording: Pools that the allocator records into.
        uses: Numbers of graphs by pool.
        workspaces: cuBLAS' workspaces by stream; each is the pool that its memory lies in, or None.
        generator: torch's default generator.
        stream: The current stream.
    """

    def __init__(self):
        self.made = self.replays = 0
        self.recording, self.uses, self.workspaces = [], {}, {}
        self.generator = FakeGenerator(self, _State())
        self.stream, self.capturing, self.broken, self.mode = "default", None, False, "default"
        self._names = itertools.count()

    def install(self, monkeypatch):
        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda: _Stream(f"side {next(self._names)}"),
            "current_stream": lambda: _Stream(self.stream),
            "stream": lambda stream: _On(self, stream),
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, next(self._names)),
            "CUDAGraph": lambda: _Graph(self),
            "graph": lambda graph, **options: _Capture(self, graph, **options),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, function in {
            "_cuda_clearCublasWorkspaces": self.workspaces.clear,
            "_cuda_endAllocateToPool": self.end_allocation,
            "_cuda_releasePool": self.release,
        }.items():
            monkeypatch.setattr(torch._C, name, function, raising=False)
        monkeypatch.setattr(ddpm_fast.engine.graph, "global_generator", lambda device: self.generator)
        monkeypatch.setattr("ddpm_fast.engine.base.can_capture", lambda device: True)
        return self

    def end_allocation(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device, pool):
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0

    def wait(self):
        """The host waits for the device."""
        if self.capturing is not None:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.mode == "warn":
            frames = traceback.extract_stack()
            user = next(f for f in reversed(frames) if f.filename != __file__ and "torch" not in f.filename)
            warnings.warn_explicit(f"{WAIT} (Triggered internally)", UserWarning, user.filename, user.lineno)


class _State:
    def __init__(self, offset=0):
        self.offset, self.capturing = offset, False


class FakeGenerator:
    """A CUDA generator: its state may be exchanged, and is flagged while a graph is captured."""

    def __init__(self, cuda, state):
        self.cuda, self.state = cuda, state

    def graphsafe_get_state(self):
        return FakeGenerator(self.cuda, self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def clone_state(self):
        return FakeGenerator(self.cuda, _State(self.state.offset))

    def get_offset(self):
        return self.state.offset

    def draw(self):
        if self.cuda.capturing is not None:
            self.cuda.capturing.increment += 4
        elif self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        else:
            self.state.offset += 4


class _Stream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        pass


class _On(TorchDispatchMode):
    """The context of a stream: sees what is launched."""

    def __init__(self, cuda, stream):
        super().__init__()
        self.cuda, self.name = cuda, stream.name

    def __enter__(self):
        self.before, self.cuda.stream = self.cuda.stream, self.name
        return super().__enter__()

    def __exit__(self, *error):
        self.cuda.stream = self.before
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            self.cuda.wait()
        result = func(*args, **(kwargs or {}))
        graph = self.cuda.capturing
        if func in PRODUCTS:
            workspace = self.cuda.workspaces.setdefault(self.name, None if graph is None else graph.pool)
            if graph is not None:
                graph.workspaces.append((self.name, workspace))
        if graph is not None and not _is_view(func):
            graph.calls.append((func, args, kwargs or {}, result))
        if graph is not None:
            graph.external.update({_address(tensor) for tensor in _tensors((args, kwargs))} - graph.made)
            graph.made.update({_address(tensor) for tensor in _tensors(result)} - graph.external)
            graph.held.append(result)  # in the graph's pool
        return result


class _Capture:
    def __init__(self, cuda, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.cuda, self.graph, self.pool = cuda, graph, pool

    def __enter__(self):
        cuda, graph = self.cuda, self.graph
        if self.pool in cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        assert cuda.uses.get(self.pool, 1) > 0, "INTERNAL ASSERT FAILED: use_count > 0"
        cuda.recording.append(self.pool)
        cuda.uses[self.pool] = cuda.uses.get(self.pool, 0) + 1
        graph.pool, graph.state = self.pool, cuda.generator.state
        graph.state.capturing, cuda.capturing = True, graph

    def __exit__(self, *error):
        cuda = self.cuda
        cuda.capturing = None
        if cuda.broken:
            cuda.broken, cuda.stream = False, "of a broken capture"
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.end_allocation(0, self.pool)
        self.graph.state.capturing = False
        weakref.finalize(self.graph, cuda.release, 0, self.pool)
        self.graph.freeze()
        cuda.made += 1


class _Graph:
    def __init__(self, cuda):
        self.cuda, self.calls, self.workspaces, self.held = cuda, [], [], []
        self.external, self.made, self.increment = set(), set(), 0

    def freeze(self):
        """Forget all tensors but those that were made in the capture: a graph knows addresses."""

        def frozen(leaf):
            if not isinstance(leaf, torch.Tensor) or _address(leaf) in self.made or not leaf.numel():
                return leaf
            return _Place(leaf)

        self.calls = [pytree.tree_map(frozen, call) for call in self.calls]
        self.held = [pytree.tree_map(frozen, result) for result in self.held]

    def replay(self):
        self.cuda.replays += 1
        if self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += self.increment
        for name, pool in self.workspaces:
            if pool is None and self.cuda.workspaces.get(name, "gone") is not None:
                raise RuntimeError(LAUNCH_FAILURE)
        for func, args, kwargs, result in self.calls:
            args, kwargs, result = pytree.tree_map_only(_Place, _Place.tensor, (args, kwargs, result))
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:  # else it has written where it wrote
                for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

    def reset(self):
        pass


class _Place:
    """A tensor as a graph knows it: where it lies in memory, whoever holds that."""

    def __init__(self, tensor):
        self.storage = weakref.ref(tensor.untyped_storage())
        self.view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self):
        storage = self.storage()
        if storage is None:
            raise RuntimeError(LAUNCH_FAILURE)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


def _tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def _is_view(func):
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
