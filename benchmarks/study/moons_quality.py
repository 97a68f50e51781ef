"""How good is a moon model? Measured moons against the data, by two-sample tests.

    python -m benchmarks.study.moons_quality [FOLDER ...] [--count 512]

Every sample is fitted with the moon that is nearest to it (ddpm_fast.data.moons.measure). Lit fraction, radius and
position of the fits are compared with those of fresh data by the Kolmogorov-Smirnov test; the misfit, the pixel
distance that no moon explains, says how sharp the pictures are. Writes benchmarks/results/moons__quality.json.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.common.results import write_result
from benchmarks.study.moons_statistics import DATA_COUNT, STATISTICS, compare, statistics_of
from ddpm_fast.data import moons
from ddpm_fast.models.checkpoint import EMBEDDED, load_checkpoint
from ddpm_fast.sample import Sampler

BATCH = 64


def draw(folder: Path, count: int) -> torch.Tensor:
    """Samples of the model in `folder`, all steps, seeds 0 … count - 1."""
    checkpoint = load_checkpoint(folder)
    sampler = Sampler(checkpoint.model, (BATCH, *checkpoint.shape), config=checkpoint.diffusion)
    starts = tqdm(range(0, count, BATCH), desc=folder.name)
    return torch.cat([sampler(seeds=start, progress=False) for start in starts])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[EMBEDDED["moons"]])
    parser.add_argument("--count", type=int, default=512)
    arguments = parser.parse_args()
    data = statistics_of(moons.batch(DATA_COUNT, seed=1_000_003))
    rows = []
    for folder in arguments.folders:
        found = statistics_of(draw(folder, arguments.count))
        row = {"model": folder.name, "training": load_checkpoint(folder).about["training"], "count": arguments.count}
        row |= compare(found, data)
        row["measured"] = {
            name: [round(value, 5) for value in found[name].tolist()] for name in (*STATISTICS, "misfit")
        }
        rows.append(row)
        for name in STATISTICS:
            print(f"{folder.name:<12}{name:<8}KS distance {row[name]['distance']:.4f}   p = {row[name]['p']:.2g}")
        print(
            f"{folder.name:<12}misfit  median {row['misfit']['median']:.4f}, "
            f"above 0.1: {row['misfit']['above_0.1']:.1%}; rejected: {row['rejected']}"
        )
    write_result("moons__quality", {"data_count": DATA_COUNT, "models": rows})


if __name__ == "__main__":
    main()
