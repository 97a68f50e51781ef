"""denoising-diffusion-pytorch imports torchvision, so the stand-in comes first."""

from benchmarks.common.standins import stand_in_for_torchvision

stand_in_for_torchvision()
