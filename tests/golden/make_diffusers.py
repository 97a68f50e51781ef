"""Regenerate diffusers.json from an installed diffusers: `python tests/golden/make_diffusers.py`.

It needs torch and diffusers alone. The tests read the JSON and never import diffusers.

diffusers keeps its betas in float32. "alphas_cumprod" and "float32_steps" are what it computes as it is; for "ddpm"
and "ddim" its alphas_cumprod are replaced by the same product in float64, so that what is compared is its algebra, to
1e-10, and not its rounding.

Left out: variance_type "fixed_large_log", whose step is NaN (the square root of a logarithm), and "learned", which
takes the square root of the network's output, where the paper's authors (and ddpm_fast) read a log variance.
"""

import itertools
import json
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler

SHAPE = (2, 2, 2)
NOISE_SEED = 5
DIGITS = 13

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
SPACINGS = ("leading", "trailing", "linspace")
INDICES = (0, 1, 2, 10, 100, 250, 500, 750, 900, 990, 998, 999)
STEPS = (1000, 999, 501, 250, 100, 61, 50, 48, 30, 10, 7, 3, 2, 1)
WALK = 30  # does not divide 1000: stride, leading, trailing and linspace all differ
ROWS = (0, 13, 28, 29)


def numbers(tensor):
    """Return the elements, row-major, with DIGITS significant digits."""
    return [float(f"{value:.{DIGITS - 1}e}") for value in tensor.flatten().tolist()]


def generator():
    return torch.Generator().manual_seed(NOISE_SEED)


def alphas_cumprod():
    names = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    for name, rescale in itertools.product(names, (False, True)):
        scheduler = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=rescale)
        yield f"{name}{' zero_snr' * rescale}", numbers(scheduler.alphas_cumprod[list(INDICES)])


def timesteps():
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        scheduler = DDPMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        every = scheduler.timesteps.tolist()
        # Long lists by their length, ends and a checksum.
        weighted = sum(i * t for i, t in enumerate(every))
        yield f"{spacing} {steps}", every if steps <= 61 else [len(every), *every[:3], *every[-3:], weighted]


def in_float64(scheduler):
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = (
            torch.tensor(1.0, dtype=torch.float64) if scheduler.config.set_alpha_to_one else scheduler.alphas_cumprod[0]
        )
    else:
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(WALK)
    return scheduler


def ddpm_steps(scheduler, x, output):
    return [
        numbers(scheduler.step(output, int(scheduler.timesteps[row]), x, generator=generator()).prev_sample)
        for row in ROWS
    ]


def ddpm(x, output):
    grid = itertools.product(PREDICTIONS, VARIANCES, SPACINGS, (True, False))
    for prediction, variance, spacing, clip in grid:
        options = {
            "prediction_type": prediction,
            "variance_type": variance,
            "timestep_spacing": spacing,
            "clip_sample": clip,
        }
        channels = output if variance == "learned_range" else output[:, : x.shape[1]]
        yield options, ddpm_steps(in_float64(DDPMScheduler(**options)), x, channels)
    thresholding = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.7}
    yield thresholding, ddpm_steps(in_float64(DDPMScheduler(**thresholding)), x, output[:, : x.shape[1]])
    clip_range = {"clip_sample_range": 0.4, "steps_offset": 1}
    yield clip_range, ddpm_steps(in_float64(DDPMScheduler(**clip_range)), x, output[:, : x.shape[1]])


def ddim(x, output, noise):
    grid = [
        (*case, True)
        for case in itertools.product(PREDICTIONS, SPACINGS, (True, False), (0.0, 0.5, 1.0), (False, True))
    ]
    grid += itertools.product(PREDICTIONS, SPACINGS, (True,), (0.5,), (False,), (False,))
    for prediction, spacing, clip, eta, use_clipped, to_one in grid:
        options = {
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "clip_sample": clip,
            "set_alpha_to_one": to_one,
        }
        scheduler = in_float64(DDIMScheduler(**options))
        results = []
        for row in ROWS:
            t = int(scheduler.timesteps[row])
            step = scheduler.step(
                output, t, x, eta=eta, use_clipped_model_output=use_clipped, variance_noise=noise if eta else None
            )
            results.append(numbers(step.prev_sample))
        yield {**options, "eta": eta, "ddim_direction": "x0" if use_clipped else "output"}, results


def float32_steps(x, output):
    for prediction in PREDICTIONS:
        scheduler = DDPMScheduler(prediction_type=prediction)
        steps = {}
        for t in (999, 500, 50, 1, 0):
            steps[t] = numbers(scheduler.step(output, t, x, generator=generator()).prev_sample)
        yield prediction, steps


def main():
    inputs = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=inputs, dtype=torch.float64)
    output = torch.randn(SHAPE, generator=inputs, dtype=torch.float64)
    v = 2 * torch.rand(SHAPE, generator=inputs, dtype=torch.float64) - 1
    both = torch.cat([output, v], dim=1)
    noise = torch.randn(SHAPE, generator=generator(), dtype=torch.float64)  # what step draws from the same seed

    # The inputs are stored in full, the results to DIGITS digits.
    content = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "indices": INDICES,
        "alphas_cumprod": dict(alphas_cumprod()),
        "timesteps": dict(timesteps()),
        "shape": SHAPE,
        "x": x.flatten().tolist(),
        "output": output.flatten().tolist(),
        "v": v.flatten().tolist(),
        "noise": noise.flatten().tolist(),
        "walk": WALK,
        "rows": ROWS,
        "ddpm": list(ddpm(x, both)),
        "ddim": list(ddim(x, output, noise)),
        "float32_steps": dict(float32_steps(x, output)),
    }
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if key in ("ddpm", "ddim"):
            text = "[\n" + ",\n".join(json.dumps(case) for case in value) + "\n]"
        entries.append(f"{json.dumps(key)}: {text}")
    Path(__file__).with_name("diffusers.json").write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
