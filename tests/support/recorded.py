"""A CUDA graph's stand-in on the CPU: what torch dispatched once, again, on the very tensors of the first time.

Unlike calling the function again it shows mistakes with static buffers: what rebinds a tensor instead of writing into
it, and what the host decided from a value, is frozen in the recording.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.engine.graph import WARMUPS, CaptureError


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CaptureError("the host reads a value (.item(), a comparison, a slice by a tensor)")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class RecordedGraph:
    """In the place of ddpm_fast.engine.graph.StepGraph."""

    made = replays = 0

    def __init__(self, body, device, pool):
        for _ in range(WARMUPS):
            body()
        with _Recorder() as recorder:
            body()
        self.calls = [call for call in recorder.calls if not _is_view(call[0])]
        RecordedGraph.made += 1

    def replay(self):
        RecordedGraph.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:  # else it has written where it wrote
                for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def _is_view(func):
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
