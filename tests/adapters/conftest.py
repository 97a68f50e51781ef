"""Before any test here imports denoising-diffusion-pytorch."""

from benchmarks.common.standins import stand_in_for_torchvision

stand_in_for_torchvision()
