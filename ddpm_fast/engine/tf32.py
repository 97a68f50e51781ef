"""TensorFloat-32: float32 products on a GPU with 10 bits of mantissa, allowed or forbidden for a while.

Torch keeps the setting for the whole process, and keeps it twice. Since 2.9 there is a tree of precisions: an operation
("matmul", "conv", "rnn") that has none takes that of its backend, and a backend that of torch. Beside it the older
switches live on (`allow_tf32`, `set_float32_matmul_precision`), and torch raises an error where both are read and do
not agree. So both are set here, to the same, and both are put back, with what an operation had of its own.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch

_OPERATIONS = (("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"))
_TREE = hasattr(torch._C, "_get_fp32_precision_getter")  # torch 2.9 and newer
_LOCK = threading.RLock()  # the setting is the process's: one thread at a time may need another one


@contextlib.contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Allow or forbid float32 products in TensorFloat-32 on CUDA inside the context; None changes nothing.

    Other threads that want a setting wait. What the process was set to comes back at the end.
    """
    if allowed is None:
        yield
        return
    with _LOCK:
        before = _Setting.read()
        try:
            with warnings.catch_warnings():  # some versions recommend the newer switches
                warnings.simplefilter("ignore")
                torch._C._set_cublas_allow_tf32(allowed)
                torch._C._set_cudnn_allow_tf32(allowed)
            for place in _OPERATIONS:
                _set(place, "tf32" if allowed else "ieee")
            yield
        finally:
            before.restore()


class _Setting:
    """What the process is set to.

    Attributes:
        matmul: The older setting of matrix products: "highest", "high" or "medium".
        cudnn: The older setting of convolutions and recurrent networks.
        own: The precisions that operations have of their own, by place in the tree; "none" is that of the backend.
    """

    def __init__(self, matmul: str, cudnn: bool, own: dict[tuple[str, str], str]) -> None:
        self.matmul, self.cudnn, self.own = matmul, cudnn, own

    @classmethod
    def read(cls) -> "_Setting":
        """Read the setting; where switches and tree do not agree, they have been made to agree on return."""
        own = {place: _own(place) for place in (*_OPERATIONS, ("mkldnn", "matmul"))} if _TREE else {}
        matmul, cudnn = "highest", False
        for allowed in (False, True):  # torch answers where the tree agrees with the switch
            for place in _OPERATIONS:
                _set(place, "tf32" if allowed else "ieee")
            with contextlib.suppress(RuntimeError):
                cudnn = torch._C._get_cudnn_allow_tf32()
            for cpu in ("ieee", "tf32", "bf16"):
                _set(("mkldnn", "matmul"), cpu)
                with contextlib.suppress(RuntimeError):
                    matmul = torch.get_float32_matmul_precision()
        return cls(matmul, cudnn, own)

    def restore(self) -> None:
        """Set the process to this again."""
        torch.set_float32_matmul_precision(self.matmul)
        torch._C._set_cudnn_allow_tf32(self.cudnn)
        for place, precision in self.own.items():
            _set(place, precision)


def _set(place: tuple[str, str], precision: str) -> None:
    if _TREE:
        torch._C._set_fp32_precision_setter(*place, precision)


def _own(place: tuple[str, str]) -> str:
    """Return the precision of a place in the tree itself: torch tells only the one that is in force there."""
    backend, operation = place
    in_force: str = torch._C._get_fp32_precision_getter(*place)
    if backend == "generic":
        return in_force
    above = ("generic", "all") if operation == "all" else (backend, "all")
    kept = _own(above)
    other = "ieee" if in_force != "ieee" else "tf32"
    _set(above, other)
    inherited = torch._C._get_fp32_precision_getter(*place) == other
    _set(above, kept)
    return "none" if inherited else in_force
