"""Measure the claims of docs/walk.md with the embedded moons.

    python -m benchmarks.study [PART ...]     half an hour on two cores; writes benchmarks/results/moons__<part>.json

The parts are the functions of this module. `python -m benchmarks.study.figures` draws the results, and
`python -m benchmarks.tables` puts them into the page.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from benchmarks.study.moons_statistics import Measured, statistics_of
from ddpm_fast.data import moons
from ddpm_fast.edit import inpaint, interpolate
from ddpm_fast.likelihood import bits_per_dimension, schedule_report
from ddpm_fast.models.checkpoint import Checkpoint, load_checkpoint
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.sample import SampleOptions, Sampler, SamplerConfig, sample
from ddpm_fast.schedules import BETA_SCHEDULES

COUNT = 128
STEPS = (1, 2, 5, 10, 20, 50, 100, 250, 1000)
SAMPLERS: dict[str, SampleOptions] = {
    "DDPM": {"sampler": "ddpm"},
    "DDIM, eta 0": {"sampler": "ddim", "eta": 0.0},
    "DDIM, eta 0.5": {"sampler": "ddim", "eta": 0.5},
    "DDIM, eta 1": {"sampler": "ddim", "eta": 1.0},
}
TEMPERATURES = (0.0, 0.5, 0.9, 1.0, 1.1)
LEVELS, LAMBDAS = (50, 100, 200, 300, 400, 600, 900), (0.25, 0.5, 0.75)
FUSION_STEPS = 100  # of a run from noise
PREVIEWS = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 20, 10, 0)


def measured(images: Tensor, data: Measured) -> dict[str, float]:
    """Return how much the images look like moons, and how near their statistics are to those of the data."""
    samples = statistics_of(images)
    return {
        **misfits(samples),
        "lit_distance": float(stats.ks_2samp(samples["lit"], data["lit"]).statistic),
        "radius_distance": float(stats.ks_2samp(samples["radius"], data["radius"]).statistic),
        "pixel_deviation": float(images.std(0).mean()),
    }


def misfits(samples: Measured) -> dict[str, float]:
    """Return the median misfit, and the share of the images whose misfit is above 0.1."""
    misfit = samples["misfit"]
    return {"misfit_median": float(np.median(misfit)), "misfit_above_0.1": float((misfit > 0.1).mean())}


def steps(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Measure the quality by the number of steps. The spacing is trailing, so a single step begins at the last t."""
    rows: list[Row] = []
    for name, sampler in SAMPLERS.items():
        for number in STEPS:
            if number == 1000 and name not in ("DDPM", "DDIM, eta 0"):
                continue
            options: SampleOptions = {**sampler, "num_inference_steps": number, "timestep_spacing": "trailing"}
            x = draw_moons(checkpoint, count, options)
            rows.append({"walk": name, "steps": number, **measured(x, data)})
            print(rows[-1], flush=True)
    return rows


def temperature(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Measure the quality when the noise of the steps is scaled. Temperature 0 follows the mean."""
    rows: list[Row] = []
    for value in TEMPERATURES:
        x = draw_moons(checkpoint, count, {"temperature": value, "num_inference_steps": 250})
        rows.append({"temperature": value, **measured(x, data)})
        print(rows[-1], flush=True)
    return rows


def previews(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Measure the distance of the x0 predictions from the final samples. Takes an eighth of the samples."""
    sampler = Sampler(checkpoint.model, (count // 8, *checkpoint.shape), config=checkpoint.diffusion)
    result = sampler(seeds=0, output="x0", output_steps=[999 - t for t in PREVIEWS])
    assert result.frames is not None
    rows: list[Row] = []
    for t, x0 in zip(result.frame_timesteps, result.frames, strict=True):
        distance = (x0 - result.sample).square().flatten(1).mean(1).sqrt()
        _, misfit = moons.measure(x0)
        rows.append({"t": t, "distance": distance.mean().item(), "misfit_median": misfit.median().item()})
    return rows


def draw_moons(checkpoint: Checkpoint, count: int, options: SampleOptions) -> Tensor:
    """Return samples of the model with the seeds 0 … count - 1."""
    all_options: SampleOptions = {**options, "seeds": 0, "config": checkpoint.diffusion}
    return sample(checkpoint.model, (count, *checkpoint.shape), **all_options)


def ends(radius: float = 8.0) -> Tensor:
    """Return a full moon and a half moon, [2, 1, 32, 32]."""
    centre = torch.full((2,), moons.SIZE / 2)
    return moons.render(moons.Moons(torch.tensor([1.0, 0.5]), torch.ones(2), centre, centre, torch.full((2,), radius)))


def fusion(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Noise a full moon and a half moon to level t, mix them and sample from the mixture. Measure the lit fractions."""
    full, half = (end.expand(count, *checkpoint.shape) for end in ends())
    ideal = IdealDenoiser(moons.batch(4096, seed=77), torch.from_numpy(checkpoint.diffusion.alphas_cumprod()))
    rows: list[Row] = []
    for name, model in (("trained", checkpoint.model), ("ideal, of 4,096 moons", ideal)):
        for level in LEVELS:
            for lam in LAMBDAS if name == "trained" else (0.5,):
                x = interpolate(
                    model, full, half, level, lam, seeds=0, config=checkpoint.diffusion,
                    num_inference_steps=FUSION_STEPS, progress=False,
                )  # fmt: skip
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


def likelihood(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Bound the bits per dimension of fresh data in 256 values, of its negative, and of noise.

    Takes an eighth of the samples.
    """
    fresh, generator = moons.batch(count // 8, seed=5), torch.Generator().manual_seed(0)
    sets = {"moons": fresh, "moons in negative": -fresh, "noise": torch.rand(fresh.shape, generator=generator) * 2 - 1}
    rows: list[Row] = []
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


def inpainting(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Draw the right halves of moons whose left halves are known. Measure how well both halves fit together."""
    known, mask = moons.batch(count // 2, seed=11), torch.zeros(1, 1, moons.SIZE, moons.SIZE)
    mask[..., : moons.SIZE // 2] = 1
    rows: list[Row] = []
    for resamplings, jump_length in ((1, 1), (5, 1), (10, 1), (10, 10)):
        x = inpaint(
            checkpoint.model, known, mask, resamplings=resamplings, jump_length=jump_length, seeds=0,
            config=checkpoint.diffusion, num_inference_steps=100, progress=False,
        )  # fmt: skip
        rows.append({"resamplings": resamplings, "jump_length": jump_length, **misfits(statistics_of(x))})
        print(rows[-1], flush=True)
    return rows


def schedules(checkpoint: Checkpoint, data: Measured, count: int) -> list[Row]:
    """Compute how near every schedule gets to noise in 1000 steps."""
    return [{"schedule": name, **schedule_report(SamplerConfig(beta_schedule=name))} for name in BETA_SCHEDULES]


Part = Callable[[Checkpoint, Measured, int], list[Row]]
PARTS: dict[str, Part] = {
    part.__name__: part for part in (schedules, fusion, previews, temperature, steps, likelihood, inpainting)
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all parts, {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="samples of each setting (default: %(default)s)")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    checkpoint = load_checkpoint()
    data = statistics_of(moons.batch(4096, seed=1_000_003))
    for name in given.parts or PARTS:
        print(write_result(f"moons__{name}", PARTS[name](checkpoint, data, given.count), count=given.count))
