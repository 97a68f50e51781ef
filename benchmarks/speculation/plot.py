"""Draw the picture of docs/speculation.md: a speculative run round by round, and calls against volume.

    python -m benchmarks.speculation.plot      draws docs/speculation.png

The run is made anew with seed 0. The calls and the volume come from benchmarks/results/cpu__speculation_calls.json.
"""

from typing import Any

import matplotlib
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import ROOT, Row, read_result
from benchmarks.speculation.run import speculative_loop
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.files import whole_file
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATH = ROOT / "docs" / "speculation.png"
WINDOWS = {0: 8, 25: 16, 100: 48}
TAKEN, IN_VAIN, REJECTED = "C0", "0.85", "C3"
MARKS = {"of the row": "o", "frozen": "x"}


def rounds() -> list[list[int]]:
    """Return the `Position` after every round of a run that draws one moon."""
    checkpoint = load_checkpoint()
    shape = (1, *checkpoint.shape)
    sampler = Sampler(checkpoint.model, shape, config=checkpoint.diffusion, speculate=WINDOWS)
    loop = speculative_loop(sampler)
    noise = PhiloxNoise([0], shape, sampler.table, torch.device("cpu"), "torch")
    return [loop._position[0].tolist() for _ in loop.steps(noise, progress=False)]


def draw_rounds(axes: Any, positions: list[list[int]]) -> None:
    """Draw a bar for each round, with its drafts, the drafts that were taken, and a mark at a rejected draft."""
    for number, position in enumerate(positions, start=1):
        start, taken = position[Position.START], position[Position.TAKEN]
        axes.barh(number, position[Position.EVALUATED], left=start, color=IN_VAIN, height=0.8)
        axes.barh(number, taken, left=start, color=TAKEN, height=0.8)
        if position[Position.OUTCOME] == Outcome.REJECTED:
            axes.plot(start + taken - 0.5, number, marker=".", color=REJECTED, markersize=4)
    steps = positions[-1][Position.ROW]
    axes.set(xlim=(0, steps), ylim=(len(positions) + 1, 0), xlabel="step", ylabel="network call")
    axes.set_title(f"One moon: {steps} steps in {len(positions)} calls", fontsize=10)
    for colour, label in ((TAKEN, "drafted and taken"), (IN_VAIN, "drafted in vain")):
        axes.barh(-9, 1, color=colour, label=label)
    axes.plot([], [], ".", color=REJECTED, label="rejected, mended by reflection")
    axes.legend(loc="upper right", fontsize=8, frameon=False)


def short(windows: str) -> str:
    """Return a short name for windows: "windows of 4 to 16, by t" for "4, 8 from 25, 16 from 100"."""
    widths = [part.split()[0] for part in windows.split(", ")]
    return f"windows of {widths[0]}" + (f" to {widths[-1]}, by t" if len(widths) > 1 else "")


def draw_costs(axes: Any, rows: list[Row]) -> None:
    """Draw calls against volume. A line joins the two guesses of each set of windows."""
    for colour, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = {guess: [row for row in rows if (row["model"], row["guess"]) == (model, guess)] for guess in MARKS}
        for guess, mark in MARKS.items():
            x, y = ([row[name] for row in own[guess]] for name in ("calls", "volume"))
            axes.plot(x, y, mark, color=f"C{colour}", markersize=5, label=f"{model}, guesses {guess}")
        for pair in zip(*own.values(), strict=True):
            x, y = ([row[name] for row in pair] for name in ("calls", "volume"))
            axes.plot(x, y, "-", color=f"C{colour}", linewidth=0.8, alpha=0.5)
            if colour == 0:
                axes.annotate(
                    short(pair[0]["windows"]),
                    (x[1], y[1]),
                    (-4, 5),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.4",
                    ha="right",
                )
    axes.set(xlabel="network calls, one after the other (1000 without)", ylabel="volume", ylim=(1, None))
    axes.set_title("Fewer calls for more evaluations", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def main() -> None:
    """Draw the picture."""
    make_parser(__doc__).parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_rounds(left, rounds())
    draw_costs(right, read_result("cpu__speculation_calls")["rows"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(PATH) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
    print(PATH)


if __name__ == "__main__":
    main()
