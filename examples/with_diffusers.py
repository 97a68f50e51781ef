"""Accelerate a pipeline of diffusers, and compare it with the original.

    python examples/with_diffusers.py [FOLDER OR HUB NAME]

Without an argument, a small network with random weights takes the place of a trained network.
"""

import sys
import time

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_fast import accelerate

if len(sys.argv) > 1:
    pipe = DDPMPipeline.from_pretrained(sys.argv[1])
else:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def timed(pipeline):
    began = time.perf_counter()
    images = pipeline(batch_size=2, generator=torch.manual_seed(0), output_type="np").images
    return images, time.perf_counter() - began


before, seconds_before = timed(pipe)
after, seconds_after = timed(accelerate(pipe))  # the only line that changes

print(f"1000 steps: {seconds_before:.1f} s before, {seconds_after:.1f} s after")
print(f"largest difference of the images, on [0, 1]: {abs(before - after).max():.1e}")
