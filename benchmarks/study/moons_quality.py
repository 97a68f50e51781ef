"""Measure the quality of a moon model: two-sample tests of measured moons against the data.

    python -m benchmarks.study.moons_quality [FOLDER ...] [--count 512]

Every sample is fitted with the moon that is nearest to it (`ddpm_fast.data.moons.measure`). The Kolmogorov-Smirnov test
compares the lit fraction, radius and position of the fits with those of fresh data. The misfit is the pixel distance
that no moon explains; a small misfit means sharp pictures. The result is written to
benchmarks/results/moons__quality.json.
"""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from benchmarks.study.moons_statistics import DATA_COUNT, STATISTICS, compare, statistics_of
from ddpm_fast.data import moons
from ddpm_fast.models.checkpoint import EMBEDDED, load_checkpoint
from ddpm_fast.sample import Sampler

BATCH = 64


def draw(folder: Path, count: int) -> torch.Tensor:
    """Return samples of the model in `folder`, with all steps and the seeds 0 … count - 1."""
    checkpoint = load_checkpoint(folder)
    sampler = Sampler(checkpoint.model, (BATCH, *checkpoint.shape), config=checkpoint.diffusion)
    starts = tqdm(range(0, count, BATCH), desc=folder.name)
    return torch.cat([sampler(seeds=start, progress=False) for start in starts])[:count]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[EMBEDDED["moons"]], metavar="FOLDER",
        help="a checkpoint folder (default: the embedded model)",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=512, help="samples of each model (default: %(default)s)")
    arguments = parser.parse_args()
    data = statistics_of(moons.batch(DATA_COUNT, seed=1_000_003))
    rows: list[Row] = []
    for folder in arguments.folders:
        samples = statistics_of(draw(folder, arguments.count))
        training = load_checkpoint(folder).about["training"]
        row: Row = {"model": folder.name, "training": training, "count": arguments.count, **compare(samples, data)}
        row["measured"] = {
            name: [round(value, 5) for value in samples[name].tolist()] for name in (*STATISTICS, "misfit")
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
