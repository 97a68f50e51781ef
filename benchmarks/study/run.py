"""What docs/walk.md says, measured on the embedded moons: steps, temperature, previews, fusion, likelihood, inpainting.

python -m benchmarks.study [PART ...]     half an hour on two cores; writes benchmarks/results/moons__<part>.json

benchmarks/study/figures.py draws it, benchmarks/tables.py puts it into the page.
"""

import argparse
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.common.results import write_result
from benchmarks.study.moons_statistics import statistics_of
from ddpm_fast.data import moons
from ddpm_fast.edit import inpaint, interpolate
from ddpm_fast.likelihood import bits_per_dimension, schedule_report
from ddpm_fast.models.checkpoint import Checkpoint, load_checkpoint
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.sample import Sampler, SamplerConfig, sample
from ddpm_fast.schedules import BETA_SCHEDULES

COUNT = 128
STEPS = (1, 2, 5, 10, 20, 50, 100, 250, 1000)
WALKS: dict[str, dict[str, Any]] = {
    "DDPM": {"sampler": "ddpm"},
    "DDIM, eta 0": {"sampler": "ddim", "eta": 0.0},
    "DDIM, eta 0.5": {"sampler": "ddim", "eta": 0.5},
    "DDIM, eta 1": {"sampler": "ddim", "eta": 1.0},
}
TEMPERATURES = (0.0, 0.5, 0.9, 1.0, 1.1)
LEVELS, LAMBDAS = (50, 100, 200, 300, 400, 600, 900), (0.25, 0.5, 0.75)
FUSION_STEPS = 100  # of a whole walk
PREVIEWS = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 20, 10, 0)


def measured(images: Tensor, data: dict[str, Any]) -> dict[str, float]:
    """How like moons the images are, and how like those of the data."""
    found = statistics_of(images)
    return {
        "misfit_median": float(np.median(found["misfit"])),
        "misfit_above_0.1": float((found["misfit"] > 0.1).mean()),
        "lit_distance": float(stats.ks_2samp(found["lit"], data["lit"]).statistic),
        "radius_distance": float(stats.ks_2samp(found["radius"], data["radius"]).statistic),
        "pixel_deviation": float(images.std(0).mean()),
    }


def steps(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Quality against the number of steps, trailing spacing: one step begins at the last timestep."""
    rows = []
    for name, walk in WALKS.items():
        for number in STEPS:
            if number == 1000 and name not in ("DDPM", "DDIM, eta 0"):
                continue
            options = {**walk, "num_inference_steps": number, "timestep_spacing": "trailing"}
            x = sample(checkpoint.model, (count, *checkpoint.shape), seeds=0, config=checkpoint.diffusion, **options)
            rows.append({"walk": name, "steps": number, **measured(x, data)})
            print(rows[-1], flush=True)
    return rows


def temperature(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What becomes of samples when the noise of the steps is scaled: 0 follows the mean."""
    rows = []
    for value in TEMPERATURES:
        options = {"temperature": value, "num_inference_steps": 250}
        x = sample(checkpoint.model, (count, *checkpoint.shape), seeds=0, config=checkpoint.diffusion, **options)
        rows.append({"temperature": value, **measured(x, data)})
        print(rows[-1], flush=True)
    return rows


def previews(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, float]]:
    """How far the guess of the origin is from what the walk ends with; the mean of an eighth of the samples."""
    count //= 8
    sampler = Sampler(checkpoint.model, (count, *checkpoint.shape), config=checkpoint.diffusion)
    found = sampler(seeds=0, output="x0", output_steps=[999 - t for t in PREVIEWS])
    rows = []
    for t, guess in zip(found.frame_timesteps, found.frames, strict=True):
        apart = (guess - found.sample).square().flatten(1).mean(1).sqrt()
        _, misfit = moons.measure(guess)
        rows.append({"t": t, "distance": apart.mean().item(), "misfit_median": misfit.median().item()})
    return rows


def ends(radius: float = 8.0) -> Tensor:
    """A full and a half moon, [2, 1, 32, 32]."""
    centre = torch.full((2,), moons.SIZE / 2)
    return moons.render(moons.Moons(torch.tensor([1.0, 0.5]), torch.ones(2), centre, centre, torch.full((2,), radius)))


def fusion(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Full moon and half moon, noised to level t, mixed and walked back: the lit fractions of all draws."""
    full, half = (end.expand(count, *checkpoint.shape) for end in ends())
    ideal = IdealDenoiser(moons.batch(4096, seed=77), checkpoint.diffusion.alphas_cumprod())
    rows = []
    for name, model in (("trained", checkpoint.model), ("ideal, of 4,096 moons", ideal)):
        for level in LEVELS:
            for lam in LAMBDAS if name == "trained" else (0.5,):
                options = {"config": checkpoint.diffusion, "num_inference_steps": FUSION_STEPS, "progress": False}
                x = interpolate(model, full, half, level, lam, seeds=0, **options)
                found, misfit = moons.measure(x)
                rows.append({
                    "model": name,
                    "level": level,
                    "lam": lam,
                    "lit_mean": found.lit.mean().item(),
                    "lit_deviation": found.lit.std().item(),
                    "gibbous": ((found.lit > 0.6) & (found.lit < 0.9)).double().mean().item(),
                    "misfit_median": misfit.median().item(),
                    "lit": [round(value, 4) for value in found.lit.tolist()],
                })  # fmt: skip
                print({key: value for key, value in rows[-1].items() if key != "lit"}, flush=True)
    return rows


def likelihood(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Bits per dimension of fresh data in 256 values, of its negative, and of noise; an eighth of the samples."""
    fresh, generator = moons.batch(count // 8, seed=5), torch.Generator().manual_seed(0)
    sets = {"moons": fresh, "moons in negative": -fresh, "noise": torch.rand(fresh.shape, generator=generator) * 2 - 1}
    rows = []
    for name, images in sets.items():
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        found = bits_per_dimension(checkpoint.model, images, config=checkpoint.diffusion, progress=False)
        rows.append({
            "images": name,
            "total": float(found.total.mean()),
            "standard_error": float(found.total.std(ddof=1) / len(found.total) ** 0.5),
            "prior": float(found.prior.mean()),
            "steps": float(found.terms[:, :-1].sum(1).mean()),
            "decoder": float(found.terms[:, -1].mean()),
            "terms": [float(f"{value:.4g}") for value in found.terms.mean(0)],
            "timesteps": found.timesteps.tolist(),
        })  # fmt: skip
        print({key: value for key, value in rows[-1].items() if key not in ("terms", "timesteps")}, flush=True)
    return rows


def inpainting(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Left halves of moons are known: how often the right halves fit, by how often the walk goes back."""
    known, mask = moons.batch(count // 2, seed=11), torch.zeros(1, 1, moons.SIZE, moons.SIZE)
    mask[..., : moons.SIZE // 2] = 1
    rows = []
    for resamplings, jump_length in ((1, 1), (5, 1), (10, 1), (10, 10)):
        how = {"resamplings": resamplings, "jump_length": jump_length}
        options = {"num_inference_steps": 100, "config": checkpoint.diffusion, "seeds": 0, "progress": False}
        x = inpaint(checkpoint.model, known, mask, **how, **options)
        found = statistics_of(x)
        misfit = {
            "misfit_median": float(np.median(found["misfit"])),
            "misfit_above_0.1": float((found["misfit"] > 0.1).mean()),
        }
        rows.append({**how, **misfit})
        print(rows[-1], flush=True)
    return rows


def schedules(checkpoint: Checkpoint, data: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """How near every schedule gets to noise in 1000 steps."""
    return [{"schedule": name, **schedule_report(SamplerConfig(beta_schedule=name))} for name in BETA_SCHEDULES]


PARTS = {part.__name__: part for part in (schedules, fusion, previews, temperature, steps, likelihood, inpainting)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="samples of each setting (default: %(default)s)")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    checkpoint = load_checkpoint()
    data = statistics_of(moons.batch(4096, seed=1_000_003))
    for name in given.parts or PARTS:
        print(write_result(f"moons__{name}", PARTS[name](checkpoint, data, given.count), count=given.count))
