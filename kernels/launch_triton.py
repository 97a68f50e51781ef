"""Launches whose compiled code is looked up once: Triton's own launch takes most of a small kernel's host time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNED = 16  # bytes: Triton compiles other code for pointers that are multiples of this
_SPECIALISED: dict[int, tuple[bool, ...]] = {}  # by kernel: which of its parameters' values Triton compiles in


Compiled = tuple[Callable[..., Any], tuple[Any, ...]]  # call the first with addresses, scalars, and the second


_KNOWN: dict[tuple[Any, ...], Compiled] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor | None], scalars: Sequence[Any], **options: Any
) -> Compiled | None:
    """Launch `kernel[grid](*tensors, *scalars, **options)` on the current device.

    The first launch of a form goes through Triton, which compiles the kernel; later launches of the form call the
    compiled kernel. A form is all that Triton compiles for: dtypes, the values of integers but those that the kernel
    declares as `do_not_specialize`, and options. Pointers that are not aligned go through Triton every time.

    Args:
        kernel: The kernel. Its parameters are the tensors, the scalars and the constants, in this order.
        grid: Numbers of programs.
        tensors: Tensors on the current device; None is a pointer that the kernel does not read.
        scalars: Numbers; None is a number that the kernel does not read.
        options: The kernel's constants, and Triton's options such as num_warps.

    Returns:
        The compiled kernel on this grid, for launches of the same form; None where every launch must go through Triton.
    """
    if type(kernel) is not JITFunction or kernel.pre_run_hooks:  # the interpreter, for one
        kernel[grid](*tensors, *scalars, **options)
        return None
    addresses, aligned = addresses_of(tensors)
    if not aligned:
        kernel[grid](*tensors, *scalars, **options)
        return None
    specialised = _SPECIALISED.get(id(kernel)) or _specialised(kernel, len(tensors), len(scalars))
    form = (
        id(kernel), torch.cuda.current_device(), grid,
        tuple([tensor if tensor is None else tensor.dtype for tensor in tensors]),
        tuple([value if keep and type(value) is not float else value is None
               for value, keep in zip(scalars, specialised, strict=True)]),
        tuple(options.values()),
    )  # fmt: skip
    known = _KNOWN.get(form)
    if known is None:
        compiled = kernel[grid](*tensors, *scalars, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(tensors) + len(scalars) :])
        known = _KNOWN[form] = compiled[(*grid, 1, 1)[:3]], constants
    else:
        run, constants = known
        run(*addresses, *scalars, *constants)
    return known


def addresses_of(tensors: Sequence[Tensor | None]) -> tuple[list[int | None], bool]:
    """Return where the tensors lie in memory, and whether all of them are aligned."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    together = 0
    for address in addresses:
        if address is not None:
            together |= address
    return addresses, together % ALIGNED == 0


def _specialised(kernel: Any, tensors: int, scalars: int) -> tuple[bool, ...]:
    """Return for each scalar whether Triton compiles its value in (1, or a multiple of 16)."""
    parameters = kernel.params[tensors : tensors + scalars]
    _SPECIALISED[id(kernel)] = tuple(not parameter.do_not_specialize for parameter in parameters)
    return _SPECIALISED[id(kernel)]
