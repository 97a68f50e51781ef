"""Measure the host's share of a step: what Python does above the driver, with a stub in place of the GPU.

    python -m benchmarks.step.host       takes a minute, needs diffusers and no GPU

A stub driver compiles the kernels for sm_90 and launches nothing: the times are those of Python and of Triton's own
Python. Each arm is timed in turns with an empty kernel of ten arguments, launched by Triton. The step is launched as it
is, which looks compiled code and checks up, and through Triton with all checks each time. The second part compares
accelerated schedulers with diffusers' own, whose operations run on a CPU with 192 elements: their time, too, is mostly
that of the host. The result is written to benchmarks/results/cpu__host.json.
"""

import contextlib
import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import Row, write_result
from ddpm_fast.config import SamplerConfig
from ddpm_fast.kernels import launch_triton, step_triton
from ddpm_fast.table import build_table

ROUNDS = 25
step_module = importlib.import_module("ddpm_fast.kernels.step")  # the package has a function of this name
STEPS = 20


class StubDriver:
    """A driver of a GPU that is not there: kernels compile for sm_90, and a launch does nothing."""

    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (object(), object(), 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


@triton.jit
def empty_kernel(a, b, c, d, e, f, g, h, i, j):  # type: ignore[no-untyped-def]
    """Take ten arguments and do nothing."""


def in_turns(arms: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """Return the median microseconds of a call of each arm; the arms take turns."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for call in arms.values():
        call()
    for _ in range(ROUNDS):
        for name, call in arms.items():
            began = time.perf_counter()
            for _ in range(calls):
                call()
            found[name].append(1e6 * (time.perf_counter() - began) / calls)
    return {name: float(np.median(times)) for name, times in found.items()}


def launches() -> list[Row]:
    """Return the host's time of a launch and of the public step, as they are and without what was looked up."""
    shape, table = (1, 3, 32, 32), build_table(SamplerConfig(num_inference_steps=STEPS))
    x, output = torch.randn(shape), torch.randn(shape, dtype=torch.bfloat16)
    coefficients, ids = table.coefficients(), table.ids()
    base, seeds = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    inputs, timestep = torch.empty(shape, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {"seeds": seeds, "clip": 1.0, "use_output": False, "x_new": x, "model_input": inputs}
    options["timestep"] = timestep
    positional = x, output, coefficients, ids, base, 0

    def public() -> None:
        step_module.step(*positional, backend="triton", **options)

    def through_triton(kernel: Any, grid: Any, tensors: Any, scalars: Any, **options: Any) -> None:
        kernel[grid](*tensors, *scalars, **options)

    def before(call: Callable[[], None]) -> Callable[[], None]:
        def changed() -> None:
            step_module._CHECKED.clear()
            step_triton._PLANS.clear()
            setattr(step_triton, "launch", through_triton)  # noqa: B010 - for mypy
            try:
                call()
            finally:
                setattr(step_triton, "launch", launch_triton.launch)  # noqa: B010

        return changed

    def implementation() -> None:
        step_triton.step_triton(*positional, **options)

    ten = x, output, coefficients, ids, base, seeds, inputs, timestep, 3, 17
    found = in_turns(
        {
            "empty kernel, 10 arguments": lambda: empty_kernel[(1,)](*ten),
            "launch through Triton": before(implementation),
            "launch": implementation,
            "public step, checked anew, through Triton": before(public),
            "public step": public,
        },
        calls=200,
    )
    empty = found["empty kernel, 10 arguments"]
    return [{"arm": name, "us": each, "over_empty": each / empty} for name, each in found.items()]


def configurations() -> dict[str, tuple[str, dict[str, Any], bool]]:
    """Return the schedulers by name: their class, their options, and whether the output has a learned variance."""
    ddpm, ddim = "DDPMScheduler", "DDIMScheduler"
    return {
        "DDPM": (ddpm, {}, False),
        "DDPM, fixed_large": (ddpm, {"variance_type": "fixed_large"}, False),
        "DDPM, learned_range": (ddpm, {"variance_type": "learned_range"}, True),
        "DDPM, v_prediction": (ddpm, {"prediction_type": "v_prediction"}, False),
        "DDPM, sample": (ddpm, {"prediction_type": "sample"}, False),
        "DDPM, no clipping": (ddpm, {"clip_sample": False}, False),
        "DDPM, thresholding": (ddpm, {"thresholding": True}, False),
        "DDIM": (ddim, {}, False),
        "DDIM, v_prediction": (ddim, {"prediction_type": "v_prediction"}, False),
        "DDIM, thresholding": (ddim, {"thresholding": True}, False),
        "DDIM, eta 0.5": (ddim, {}, False),
    }


def schedulers() -> list[Row]:
    """Return the microseconds of scheduler.step for each configuration, diffusers' own and accelerated, in turns."""
    import diffusers

    import ddpm_fast

    rows: list[Row] = []
    x = torch.randn(1, 3, 8, 8)
    for name, (kind, options, learned) in configurations().items():
        output = torch.randn(1, 6 if learned else 3, 8, 8)
        extra = {"eta": 0.5} if "eta" in name else {}

        def arm(scheduler: Any, output: Any = output, extra: Any = extra) -> Callable[[], None]:
            scheduler.set_timesteps(STEPS)
            timesteps = scheduler.timesteps
            generator = torch.Generator().manual_seed(0)

            def call() -> None:
                state = x
                for t in timesteps:
                    state = scheduler.step(output, t, state, generator=generator, **extra).prev_sample

            return call

        make = getattr(diffusers, kind)
        accelerated = ddpm_fast.accelerate(make(**options))
        accelerated._backend = "triton"  # as on a GPU
        arms = {"diffusers": arm(make(**options)), "accelerated": arm(accelerated)}
        found = in_turns(arms, calls=10)
        per_step = {key: us / STEPS for key, us in found.items()}
        rows.append({"scheduler": name, **per_step, "ratio": found["diffusers"] / found["accelerated"]})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    add_result_options(parser)
    given = parser.parse_args()
    driver.set_active(StubDriver())
    torch.set_num_threads(1)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        for module in ("step", "threshold"):
            name = f"ddpm_fast.kernels.{module}"
            chosen = mock.patch.object(importlib.import_module(name), "choose_backend", lambda device, backend: backend)
            patches.enter_context(chosen)
        found = launches()
        for row in found:
            print(f"{row['arm']:45}{row['us']:8.1f} us, {row['over_empty']:.2f} of an empty kernel", flush=True)
        compared = schedulers()
    for row in compared:
        print("{scheduler:26}{diffusers:8.1f} us, accelerated {accelerated:.1f}: {ratio:.2f}".format(**row))
    write_result("cpu__host", compared, folder=given.out, commit=given.commit, launches=found)


if __name__ == "__main__":
    main()
