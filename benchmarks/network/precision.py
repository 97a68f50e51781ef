"""What precision, memory format and compilation of the network do to the images, against float32 as it is.

The embedded model's, 1000 steps, same seeds.


    python -m benchmarks.network.precision    writes results/cpu__precision.json; docs/network.md shows the file
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import write_result
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler

SEEDS = range(4)
MODES: dict[str, dict[str, Any]] = {
    "float32": {"optimize": None},
    "float32, hoisted": {"optimize": "hoist"},
    "float32, hoisted, channels_last": {"optimize": "hoist", "memory_format": "channels_last"},
    "float32, hoisted, channels_last, compiled": {
        "optimize": "hoist",
        "memory_format": "channels_last",
        "compile": True,
    },
    "bfloat16": {"dtype": torch.bfloat16, "optimize": None},
    "bfloat16, hoisted": {"dtype": torch.bfloat16, "optimize": "hoist"},
    "float16": {"dtype": torch.float16, "optimize": None},
    "float16, hoisted": {"dtype": torch.float16, "optimize": "hoist"},
}


def walk(options: dict[str, Any]) -> Tensor:
    """x_0 on [-1, 1]."""
    checkpoint = load_checkpoint()
    shape = (len(SEEDS), *checkpoint.shape)
    sampler = Sampler(checkpoint.model, shape, config=checkpoint.diffusion, **options)
    return sampler(seeds=SEEDS, progress=False)


def main() -> None:
    rows = []
    exact: Tensor | None = None
    for name, options in MODES.items():
        images = walk(options)
        exact = images if exact is None else exact
        difference = (images - exact).abs()
        rows.append({
            "network": name,
            "largest": difference.max().item(),
            "mean": difference.mean().item(),
            "pixels_off_by_one_of_255": (difference > 2 / 255).double().mean().item(),
        })  # fmt: skip
        print("{network:42} difference {largest:.1e}, mean {mean:.1e}".format(**rows[-1]))
    print(write_result("cpu__precision", rows, samples=len(SEEDS), steps=1000))


if __name__ == "__main__":
    main()
