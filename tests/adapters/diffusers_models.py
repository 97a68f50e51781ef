"""Small real networks of diffusers, with fixed random weights."""

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel, VQModel
from diffusers.models.unets.unet_2d import UNet2DOutput

CONFIG = {
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


class Denoiser(UNet2DModel):
    """A UNet that nearly predicts the noise of data N(0, 1/4), on diffusers' linear schedule.

    A walk with random weights alone is chaotic: diffusers in float32 and diffusers in float64 then give other images.
    """

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        random = super().forward(sample, timestep, class_labels).sample
        alpha_bars = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0).to(sample.device)
        alpha_bar = alpha_bars[timestep].view(-1, 1, 1, 1)
        ideal = ((1 - alpha_bar) ** 0.5 / (alpha_bar / 4 + 1 - alpha_bar)).to(sample.dtype) * sample
        return UNet2DOutput(sample=ideal + 0.1 * random)


class Elementwise(UNet2DModel):
    """A UNet whose forward is a few elementwise operations, for tests of tables over many configurations."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        t = timestep.view(-1, *[1] * (sample.dim() - 1)) / 1000
        out = torch.tanh(sample * (1 + t)) + 0.1 * sample.roll(1, -1)
        copies = self.config.out_channels // self.config.in_channels
        return UNet2DOutput(sample=torch.cat([out, 0.5 * torch.sin(3 * sample)], 1)[:, : copies * sample.shape[1]])


def unet(channels: int = 3, out_channels: int | None = None, size: int = 8, kind: type = UNet2DModel) -> UNet2DModel:
    torch.manual_seed(0)
    return kind(sample_size=size, in_channels=channels, out_channels=out_channels or channels, **CONFIG).eval()


def transformer(learned: bool = True) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned else 4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    for parameter in network.parameters():  # its last layer begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()


def vqvae() -> VQModel:
    torch.manual_seed(0)
    return VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, scaling_factor=0.5).eval()
