"""Draw the pictures of docs/walk.md.

    python -m benchmarks.study.figures [NAME ...]      writes docs/figures/<name>.png

The embedded model draws the moons, and the ideal denoiser of a toy set draws the points. The curves and histograms show
benchmarks/results/moons__*.json, which `python -m benchmarks.study` writes. The seeds are 0, 1, 2, …; no seed was
chosen for its picture.
"""

from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import ROOT
from benchmarks.study.digits_quality import draw_digits
from benchmarks.study.run import FUSION_STEPS, LAMBDAS, LEVELS, PREVIEWS, STEPS, draw_moons, ends
from benchmarks.study.tables import rows_of
from ddpm_fast.data import moons
from ddpm_fast.data.digits import halves
from ddpm_fast.edit import inpaint, interpolate
from ddpm_fast.files import whole_file
from ddpm_fast.kernels import q_sample, q_step
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.sample import SampleOptions, Sampler, SamplerConfig, sample
from ddpm_fast.seeding import seed_tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = ROOT / "docs" / "figures"
CONFIG = SamplerConfig()
OUTPUTS: tuple[Literal["trajectory", "x0"], ...] = ("trajectory", "x0")
ALPHA_BARS = torch.from_numpy(CONFIG.alphas_cumprod())


def forward() -> Any:
    """Draw one moon on its way to noise: in closed form above, one step at a time below."""
    levels = (0, 20, 50, 100, 200, 300, 400, 600, 800, 999)
    moon, seed = moons.batch(1, seed=3), seed_tensor([0])
    x, stepwise = moon.clone(), {}
    for t in range(1000):
        x = q_step(x, torch.tensor([t]), 1 - torch.from_numpy(CONFIG.betas()), seeds=seed)
        stepwise[t] = x.clone()
    closed = [q_sample(moon, torch.tensor([t]), ALPHA_BARS, seeds=seed) for t in levels]
    titles = [f"t = {t}\n{ALPHA_BARS[t].sqrt():.2f} of it left" for t in levels]
    rows = [[moon, *closed], [moon, *(stepwise[t] for t in levels)]]
    return _strip(rows, ["x_0", *titles], ["at once", "step by step"])


def spiral(count: int = 600) -> Tensor:
    """Return points on a spiral, [count, 2, 1]."""
    angle = torch.linspace(0.5, 3.0, count) * torch.pi
    return (torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / (3.0 * torch.pi))[..., None]


def points() -> Any:
    """Draw a set of points in two dimensions on its way to noise and back."""
    levels, data = (0, 50, 150, 400, 999), spiral()
    count = 800
    seeds = seed_tensor(range(count))
    x_0 = data[torch.randint(len(data), (count,), generator=torch.Generator().manual_seed(0))]
    out = [q_sample(x_0, torch.full((count,), t), ALPHA_BARS, seeds=seeds) for t in levels]
    kept = [999 - t for t in reversed(levels)]
    result = sample(
        IdealDenoiser(data, ALPHA_BARS), (count, 2, 1), output="trajectory", output_steps=kept, seeds=0,
        clip_sample=False, progress=False,
    )  # fmt: skip
    assert result.frames is not None
    figure, panels = plt.subplots(2, len(levels), figsize=(11, 4.9), layout="constrained", sharex=True, sharey=True)
    colours = x_0[:, 0, 0].atan2(x_0[:, 1, 0])
    for panel, x, t in zip(panels[0], out, levels, strict=True):
        panel.scatter(x[:, 0], x[:, 1], s=2, c=colours, cmap="twilight")
        panel.set_title(f"out: t = {t}", fontsize=9)
    final_colours = result.sample[:, 0, 0].atan2(result.sample[:, 1, 0])
    for panel, x, t in zip(panels[1], reversed(result.frames), levels, strict=True):
        panel.scatter(x[:, 0], x[:, 1], s=2, c=final_colours, cmap="twilight")
        panel.set_title(f"back: after the step at t = {t}", fontsize=9)
    for panel in panels.flat:
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    return figure


def previews() -> Any:
    """Draw the states and the x0 predictions of one run, and how the predictions become sharper."""
    checkpoint = load_checkpoint()
    shown = [t for t in PREVIEWS if t not in (10, 20)]
    kept = [999 - t for t in shown]
    sampler = Sampler(checkpoint.model, (1, *checkpoint.shape), config=checkpoint.diffusion)
    rows = []
    for output in OUTPUTS:
        frames = sampler(seeds=0, output=output, output_steps=kept, progress=False).frames
        assert frames is not None
        rows.append(list(frames))
    figure = _strip(rows, [f"t = {t}" for t in shown], ["x_t", "guess of x_0"], below=2.2)
    panel = figure.add_axes((0.1, 0.12, 0.88, 0.31))
    measured = rows_of("previews")
    for key, style, label in (("distance", "o-", "guess to final image"), ("misfit_median", "s--", "guess to a moon")):
        panel.plot([row["t"] for row in measured], [row[key] for row in measured], style, label=label)
    panel.set(xlabel="t", ylabel="root mean square", xlim=(1010, -10))
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def steps() -> Any:
    """Draw the quality against the number of steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = rows_of("steps")
    for name in dict.fromkeys(row["walk"] for row in rows):
        own = [row for row in rows if row["walk"] == name]
        left.plot([row["steps"] for row in own], [row["misfit_median"] for row in own], "o-", markersize=4, label=name)
        right.plot([row["steps"] for row in own], [row["lit_distance"] for row in own], "o-", markersize=4, label=name)
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance to the nearest moon, median")
    right.set(xscale="log", xlabel="steps", ylabel="lit fraction: KS distance to the data", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def collapse() -> Any:
    """Draw the same seeds in fewer and fewer steps. A single step returns the mean of all moons."""
    checkpoint = load_checkpoint()
    rows = []
    for count in reversed(STEPS):
        options: SampleOptions = {"num_inference_steps": count, "timestep_spacing": "trailing", "progress": False}
        rows.append(list(draw_moons(checkpoint, 10, options)[:, None]))
    labels = [f"{count} step{'s' if count > 1 else ''}" for count in reversed(STEPS)]
    return _strip(rows, [f"seed {seed}" for seed in range(10)], labels)


def temperature() -> Any:
    """Draw the same seeds with less noise in the steps. Without noise, the mean alone is no sample."""
    checkpoint = load_checkpoint()
    rows = []
    for value in (0.0, 0.5, 1.0):
        options: SampleOptions = {"num_inference_steps": 250, "temperature": value, "progress": False}
        rows.append(list(draw_moons(checkpoint, 10, options)[:, None]))
    return _strip(rows, [f"seed {seed}" for seed in range(10)], ["temperature 0", "0.5", "1"])


def fusion() -> Any:
    """Draw the fusions of a full moon and a half moon: their mean, three of them, and the lit fractions of all."""
    checkpoint, rows = load_checkpoint(), rows_of("fusion")
    full, half = (end.expand(64, *checkpoint.shape) for end in ends())
    figure, panels = plt.subplots(
        4 + len(LAMBDAS), len(LEVELS), figsize=(1.6 * len(LEVELS), 9.5), layout="constrained",
        height_ratios=[1] * 4 + [0.8] * len(LAMBDAS),
    )  # fmt: skip
    for column, level in enumerate(LEVELS):
        x = interpolate(
            checkpoint.model, full, half, level, 0.5, config=checkpoint.diffusion, num_inference_steps=FUSION_STEPS,
            seeds=0, progress=False,
        )  # fmt: skip
        for place, picture in enumerate([x.mean(0), *x[:3]]):
            _show(panels[place, column], picture)
        panels[0, column].set_title(f"t = {level}", fontsize=9)
        for place, lam in enumerate(LAMBDAS):
            panel = panels[4 + place, column]
            (row,) = (r for r in rows if (r["model"], r["level"], r["lam"]) == ("trained", level, lam))
            panel.hist(row["lit"], bins=np.linspace(0, 1, 21).tolist(), color="C0")
            panel.axvline(row["lit_mean"], color="C1")
            panel.set(xlim=(0, 1), yticks=[], xticks=[0, 0.5, 1])
            panel.set_title(f"mean {row['lit_mean']:.2f}, gibbous {row['gibbous']:.0%}", fontsize=7)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right", "left"]].set_visible(False)
    names = ["mean of 64", "seed 0", "seed 1", "seed 2", *(f"lit fraction,\nλ = {lam}" for lam in LAMBDAS)]
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name, fontsize=8)
    return figure


def inpainting() -> Any:
    """Draw moons whose left half is known, by a plain run and by a run with resamplings."""
    checkpoint = load_checkpoint()
    known = moons.batch(10, seed=11)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    rows: list[list[Tensor]] = [list(known[:, None]), list((known * mask - (1 - mask))[:, None])]
    for resamplings in (1, 10):
        x = inpaint(
            checkpoint.model, known, mask, resamplings=resamplings, jump_length=1, num_inference_steps=100,
            config=checkpoint.diffusion, seeds=0, progress=False,
        )  # fmt: skip
        rows.append(list(x[:, None]))
    return _strip(rows, [""] * 10, ["the moon", "known", "plain walk", "10 resamplings"])


def digits() -> Any:
    """Draw digits, each over the nearest digit of the training data."""
    seen, _ = halves()
    rows, labels = [], []
    for guidance in (1.0, 2.0):
        images = draw_digits("digits", 10, guidance, progress=False).images
        nearest = torch.cdist(images.flatten(1), seen.images.flatten(1)).argmin(1)
        rows += [list(images[:, None]), list(seen.images[nearest][:, None])]
        labels += [f"guidance {guidance:g}", "nearest seen"]
    return _strip(rows, [str(seed) for seed in range(10)], labels)


def _strip(rows: list[list[Tensor]], titles: list[str], labels: list[str], below: float = 0.0) -> Any:
    """Return a figure of pictures in rows.

    Args:
        rows: The pictures of each row.
        titles: The titles of the columns.
        labels: The labels of the rows.
        below: Height of the room below the pictures, in inches.
    """
    columns = len(rows[0])
    height = 1.0 * len(rows) + 0.5
    figure, panels = plt.subplots(len(rows), columns, figsize=(1.0 * columns + 1.0, height + below), squeeze=False)
    bottom = below / (height + below) + 0.01
    figure.subplots_adjust(
        left=0.1, right=0.995, bottom=bottom, top=1 - 0.42 / (height + below), wspace=0.04, hspace=0.04
    )
    for line, pictures in zip(panels, rows, strict=True):
        for panel, picture in zip(line, pictures, strict=True):
            _show(panel, picture)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=8)
    for panel, label in zip(panels[:, 0], labels, strict=True):
        panel.set_ylabel(label, fontsize=8)
    return figure


def _show(panel: Any, picture: Tensor) -> None:
    panel.imshow(picture.reshape(picture.shape[-2:]).clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set_visible(False)


FIGURES: dict[str, Callable[[], Any]] = {
    figure.__name__: figure
    for figure in (forward, points, previews, steps, collapse, temperature, fusion, inpainting, digits)
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[[], *FIGURES], metavar="NAME", help=f"default: all pictures, {', '.join(FIGURES)}"
    )
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().names or FIGURES:
        figure = FIGURES[name]()
        with whole_file(FOLDER / f"{name}.png") as part:
            figure.savefig(part, format="png", dpi=110)
        plt.close(figure)
        print(FOLDER / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
