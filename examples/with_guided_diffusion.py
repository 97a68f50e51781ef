"""Accelerate a model of OpenAI's guided-diffusion, and compare it with the original.

    PYTHONPATH=CHECKOUT python examples/with_guided_diffusion.py

guided-diffusion is not on PyPI. CHECKOUT is a clone of openai/guided-diffusion. The weights are random.
"""

import time

import torch
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

from ddpm_fast import accelerate

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
flags = model_and_diffusion_defaults()
flags.update(image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="8", learn_sigma=True)
model, diffusion = create_model_and_diffusion(**{**flags, "timestep_respacing": "100"})
model.eval().to(device)


def timed(sampler):
    torch.manual_seed(0)
    began = time.perf_counter()
    images = sampler.p_sample_loop(model, (1, 3, 64, 64), device=device).cpu()
    return images, time.perf_counter() - began


before, seconds_before = timed(diffusion)
after, seconds_after = timed(accelerate(diffusion))  # the only line that changes

print(f"100 steps: {seconds_before:.1f} s before, {seconds_after:.1f} s after")
print(f"largest difference of the images, on [-1, 1]: {(before - after).abs().max():.1e}")
