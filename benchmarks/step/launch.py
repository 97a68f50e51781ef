"""The host time of a launch of the step, against an empty Triton kernel with the same arguments."""

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.timers import Launch, Timer, host_times
from benchmarks.step.arms import NEXT, make_problem
from ddpm_fast.kernels.step import implementation, step

SHAPE = (256, 3, 32, 32)


def launch_cost(
    device: torch.device, backend: str, timer: Timer, shape: tuple[int, ...] = SHAPE, launches: int = 500
) -> dict[str, Any]:
    """Measure the host time of the step, checked and unchecked, and of an empty Triton kernel with the same arguments.

    The case is the engine's: noise from seeds, clip, next input and timestep. Off a GPU there is no empty kernel.
    """
    p = make_problem(NEXT, shape, device)
    operands = (p.x, p.output, p.coefficients, p.ids, p.base, 0)
    unchecked = implementation(backend)
    functions = {
        "implementation": lambda: unchecked(*operands, **p.options, x_new=p.x),
        "step": lambda: step(*operands, **p.options, x_new=p.x, backend=backend),
    }
    described = {"case": NEXT.name, "shape": list(shape), "launches": launches}
    if backend != "triton":
        return described | {"host": host_times(timer, functions, launches), "empty": "no Triton kernel here"}
    from ddpm_fast.kernels import step_triton

    try:
        grid, arguments, options = recorded_launch(step_triton, "step_kernel", functions["implementation"])
    except NoLaunchError as error:
        return described | {"host": host_times(timer, functions, launches), "empty": str(error)}
    with empty_kernel(step_triton.step_kernel) as empty:
        functions["empty kernel"] = lambda: empty[grid](*arguments, **options)
        host = host_times(timer, functions, launches)
    for name in ("implementation", "step"):
        host[name]["over_empty"] = host[name]["median_us"] / host["empty kernel"]["median_us"] - 1
    return described | {"host": host, "empty": f"{len(arguments) + len(options)} arguments"}


class NoLaunchError(RuntimeError):
    """An error for a call that did not launch the kernel by `kernel[grid](…)`."""


def recorded_launch(module: Any, name: str, call: Launch) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return grid, arguments and options of the first launch of `module.<name>` in `call`, without a launch."""
    launches = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: launches.append((grid, arguments, options))

    kernel = getattr(module, name)
    setattr(module, name, Recorder())
    try:
        call()
    finally:
        setattr(module, name, kernel)
    if not launches:
        raise NoLaunchError(f"no launch of {name} was seen")
    return launches[0]


@contextlib.contextmanager
def empty_kernel(kernel: Any) -> Iterator[Any]:
    """Make a Triton kernel with the parameters of `kernel` (kinds and specialisation too) that does nothing.

    Triton reads a kernel's source from its file: there is one as long as the context lasts.
    """
    import triton
    import triton.language as tl

    parameters = inspect.signature(kernel.fn).parameters.values()
    plain = [p.name for p in getattr(kernel, "params", ()) if p.do_not_specialize]
    text = f"def empty({', '.join(map(_declaration, parameters))}):\n    pass\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.py"
        path.write_text(text, encoding="utf-8")
        names: dict[str, Any] = {"tl": tl, "__name__": "empty"}
        exec(compile(text, str(path), "exec"), names)
        yield triton.jit(do_not_specialize=plain)(names["empty"])


def _declaration(parameter: inspect.Parameter) -> str:
    kind = ": tl.constexpr" if "constexpr" in str(parameter.annotation) else ""
    return parameter.name + kind + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
