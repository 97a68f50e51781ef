"""The smallest U-Net that has every kind of layer, for tests that need a network of the project."""

import torch

from ddpm_fast.models.unet import UNet, UNetConfig

TINY = UNetConfig(widths=(8, 8), attention=(False, True), embedding=16, image_size=8, heads=2, groups=4)


def random_unet(config=TINY, seed=0, std=0.1):
    """Return a network without zero parameters, unlike a network at the start of training."""
    torch.manual_seed(seed)
    model = UNet(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model
