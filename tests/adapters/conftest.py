"""Before any test here imports denoising-diffusion-pytorch."""

from standins import stand_in_for_torchvision

stand_in_for_torchvision()
