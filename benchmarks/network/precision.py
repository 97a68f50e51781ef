"""Compare the images of other precisions, memory formats and a compiled network with those of plain float32.

    python -m benchmarks.network.precision      writes benchmarks/results/cpu__precision.json

All runs draw the same seeds with the embedded model in 1000 steps. docs/network.md shows the result.
"""

import torch
from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.options import SamplerOptions
from ddpm_fast.sample import Sampler

SEEDS = range(4)
MODES: dict[str, SamplerOptions] = {
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


def draw(options: SamplerOptions) -> Tensor:
    """Return the images of `SEEDS`, on [-1, 1]."""
    checkpoint = load_checkpoint()
    shape = (len(SEEDS), *checkpoint.shape)
    all_options: SamplerOptions = {**options, "config": checkpoint.diffusion}
    sampler = Sampler(checkpoint.model, shape, **all_options)
    return sampler(seeds=SEEDS, progress=False)


def main() -> None:
    make_parser(__doc__).parse_args()
    rows: list[Row] = []
    exact: Tensor | None = None
    for name, options in MODES.items():
        images = draw(options)
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
