"""Install the stand-in for torchvision before any test imports denoising-diffusion-pytorch."""

from benchmarks.common.standins import stand_in_for_torchvision

stand_in_for_torchvision()
