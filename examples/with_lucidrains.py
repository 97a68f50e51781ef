"""Accelerate a model of denoising-diffusion-pytorch, and compare it with the original.

    python examples/with_lucidrains.py [model-N.pt]

The file is a checkpoint of the library's Trainer. The Unet and the GaussianDiffusion below must have the settings of
the training. Without a file, the weights are random.
"""

import sys
import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

from ddpm_fast import accelerate
from ddpm_fast.adapters.lucidrains import load_trainer_checkpoint

torch.manual_seed(0)
diffusion = GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2)), image_size=8, timesteps=1000)
if len(sys.argv) > 1:
    load_trainer_checkpoint(sys.argv[1], diffusion)
diffusion.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def timed(sampler):
    torch.manual_seed(0)
    began = time.perf_counter()
    images = sampler.sample(batch_size=2).cpu()
    return images, time.perf_counter() - began


before, seconds_before = timed(diffusion)
after, seconds_after = timed(accelerate(diffusion))  # the only line that changes

print(f"1000 steps: {seconds_before:.1f} s before, {seconds_after:.1f} s after")
print(f"largest difference of the images, on [0, 1]: {(before - after).abs().max():.1e}")
