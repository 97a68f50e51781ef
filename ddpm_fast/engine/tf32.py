"""TensorFloat-32: float32 products on a GPU with 10 bits of mantissa, allowed or forbidden for a while.

Torch keeps the setting for the whole process, and keeps the setting twice. Since 2.9 products obey a tree of
precisions: an operation ("matmul", "conv", "rnn") that has none of its own takes that of its backend, and a backend
that of torch. Beside the tree the older switches live on (`allow_tf32`, `set_float32_matmul_precision`). They write to
the tree, too, and torch raises an error where a switch is read that the tree contradicts. So both are set here, to the
same, and both are put back.

One precision cannot be put back. Since 2.13 a convolution begins as "TF32, unless a place above says otherwise", and no
call sets that again. Such an operation is left alone and obeys its backend. cuDNN's older switch, which would
write to the operation, is left alone as well; it cannot be read inside where the tree contradicts it.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from ddpm_fast.engine.locks import make_reentrant_lock

Place = tuple[str, str]  # in the tree: a backend and its operation

_TORCH, _CUDA, _CPU = ("generic", "all"), ("cuda", "all"), ("mkldnn", "all")
_MATMUL, _CUDNN = ("cuda", "matmul"), (("cuda", "conv"), ("cuda", "rnn"))
_CPU_MATMUL = ("mkldnn", "matmul")  # written by `set_float32_matmul_precision`
_TREE = hasattr(torch._C, "_get_fp32_precision_getter")  # torch 2.9 and newer
_LOCK = make_reentrant_lock()  # the setting is the process's: one thread at a time may need another one


@contextlib.contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Allow or forbid float32 products in TensorFloat-32 on CUDA inside the context; None changes nothing.

    Other threads that want a setting wait. What the process was set to comes back at the end.
    """
    if allowed is None:
        yield
        return
    with _LOCK:
        before = _Setting()
        try:
            before.overrule(allowed)
            yield
        finally:
            before.restore()


def in_force(operation: str) -> bool:
    """Return whether float32 products of an operation, "conv" or "matmul", may be TensorFloat-32 on CUDA now."""
    if _TREE:
        return bool(torch._C._get_fp32_precision_getter("cuda", operation) == "tf32")
    return bool({"conv": torch._C._get_cudnn_allow_tf32, "matmul": torch._C._get_cublas_allow_tf32}[operation]())


class _Setting:
    """What the process is set to. Reading takes the tree apart: `overrule` or `restore` must follow.

    Attributes:
        own: The precisions that places in the tree have of their own ("none": that of the place above), as far as they
            can be set again.
        fixed: Whether an operation of cuDNN has a precision that cannot be set again.
        matmul: The older switch of matrix products: "highest", "high" or "medium".
        cudnn: The older switch of convolutions and recurrent networks.
    """

    def __init__(self) -> None:
        self.own: dict[Place, str] = {}
        # From the root on, so that "none" stands above every place that is read: torch tells the one in force there.
        for place in (_TORCH, _CUDA, _CPU, _MATMUL, *_CUDNN, _CPU_MATMUL) if _TREE else ():
            self.own[place] = torch._C._get_fp32_precision_getter(*place)
            if place[1] == "all":
                _set(place, "none")
        _set(_CUDA, "ieee")
        fixed = [place for place in _CUDNN if _TREE and self._obeys_its_backend(place)]
        self.fixed = bool(fixed)
        for place in fixed:
            del self.own[place]
        # An older switch answers where the tree agrees with the switch.
        for place in self.own:
            _set(place, "tf32" if place in (_CUDA, *_CUDNN) else "ieee")
        with _quiet():
            self.matmul = torch.get_float32_matmul_precision()
            try:
                self.cudnn = torch._C._get_cudnn_allow_tf32()
            except RuntimeError:
                self.cudnn = False

    def overrule(self, allowed: bool) -> None:
        """Set the process to TF32, or to none."""
        with _quiet():
            if (self.matmul != "highest") != allowed:
                torch._C._set_cublas_allow_tf32(allowed)
            if not self.fixed:
                torch._C._set_cudnn_allow_tf32(allowed)
        for place, own in self.own.items():
            _set(place, ("tf32" if allowed else "ieee") if place[0] == "cuda" else own)

    def restore(self) -> None:
        """Set the process to this again."""
        with _quiet():
            torch.set_float32_matmul_precision(self.matmul)
            if not self.fixed:
                torch._C._set_cudnn_allow_tf32(self.cudnn)
        for place, own in self.own.items():
            _set(place, own)

    def _obeys_its_backend(self, place: Place) -> bool:
        """Return whether a place whose own precision seems to be TF32 now has the backend's, which is "ieee"."""
        return self.own[place] == "tf32" and torch._C._get_fp32_precision_getter(*place) == "ieee"


def _set(place: Place, precision: str) -> None:
    if _TREE:
        torch._C._set_fp32_precision_setter(*place, precision)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the older switches: some versions of torch recommend the newer ones at each use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
