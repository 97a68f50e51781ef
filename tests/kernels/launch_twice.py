"""Launch kernels twice with a driver that is not there, and print what the second launch passes that the first did not.

A program of its own, outside the interpreter. The first launch is Triton's, the second calls the compiled kernel.
"""

import importlib
import json

import torch
from triton.runtime import driver

from benchmarks.step.host import StubDriver
from ddpm_fast.kernels import launch_triton
from ddpm_fast.kernels.specialisations import SPECIALISATIONS
from tests.kernels.compile_all import LAUNCHES

NAMES = (
    "step-engine", "step-engine-channels-last", "step-engine-learned-guided", "step-engine-thresholding-x0",
    "step-engine-inpaint", "step-tensor-noise", "step-engine-odd-size", "q_sample-philox", "q_sample-tensor",
    "threshold", "threshold-guided", "normal-step", "to_uint8-round", "draft", "verify-bound", "decide",
    "commit-guided",
)  # fmt: skip


class Recording(StubDriver):
    """A driver that keeps the arguments of launches."""

    def __init__(self):
        self.launched = []

    def launcher_cls(self, source, metadata):
        def run(*arguments):
            self.launched.append([plain(argument) for argument in arguments])

        return run


def plain(argument):
    """Return an argument as the driver reads it: a tensor is its address."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, (int, float, str, type(None))) else type(argument).__name__


def main():
    recording, found = Recording(), {}
    driver.set_active(recording)
    torch.cuda.current_device = lambda: 0
    run, jitted = launch_triton.JITFunction.run, []

    def counted(*arguments, **named):
        jitted.append(arguments)
        return run(*arguments, **named)

    launch_triton.JITFunction.run = counted
    for specialisation in (each for each in SPECIALISATIONS if each.name in NAMES):
        module = importlib.import_module(specialisation.kernel().fn.__module__)
        recording.launched.clear()
        jitted.clear()
        for _ in range(2):
            launch = getattr(module, f"{specialisation.op}_triton")
            LAUNCHES[specialisation.op](launch, specialisation.launch_arguments())
        first, second = recording.launched
        differences = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
        found[specialisation.name] = {"jitted": len(jitted), "differences": differences}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
