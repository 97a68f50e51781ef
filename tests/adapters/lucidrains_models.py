"""Small real networks and diffusions of denoising-diffusion-pytorch, with fixed random weights."""

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion, Unet, Unet1D

from ddpm_fast import accelerate

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
ROOM = {"dim": 8, "dim_mults": (1, 2)}


def unet(self_condition: bool = False, **kwargs) -> Unet:
    torch.manual_seed(0)
    return Unet(**ROOM, self_condition=self_condition, flash_attn=False, **kwargs).eval()


def unet_1d(self_condition: bool = False, channels: int = 3) -> Unet1D:
    torch.manual_seed(0)
    return Unet1D(**ROOM, self_condition=self_condition, channels=channels).eval()


def diffusion(model=None, image_size=8, timesteps=25, **kwargs) -> GaussianDiffusion:
    return GaussianDiffusion(model or unet(), image_size=image_size, timesteps=timesteps, **kwargs)


def learned(timesteps=25, **kwargs) -> LearnedGaussianDiffusion:
    return LearnedGaussianDiffusion(unet(learned_variance=True), image_size=8, timesteps=timesteps, **kwargs)


def diffusion_1d(model=None, seq_length=16, timesteps=25, **kwargs) -> GaussianDiffusion1D:
    return GaussianDiffusion1D(model or unet_1d(), seq_length=seq_length, timesteps=timesteps, **kwargs)


class Denoiser(torch.nn.Module):
    """A network that nearly tells the noise (or v, or x0) of data N(0, 1/4): no walk with it is chaotic.

    With random weights alone two walks in float32 that round otherwise part, step by step.
    """

    channels = out_dim = 3

    def __init__(self, alpha_bars, objective="pred_noise", self_condition=False, share=0.1):
        super().__init__()
        self.random = unet(self_condition)
        self.self_condition = self_condition
        self.objective = objective
        self.share = share
        self.register_buffer("alpha_bars", alpha_bars.clone())

    def forward(self, x, t, x_self_cond=None):
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        variance = alpha_bar / 4 + 1 - alpha_bar
        scale = {
            "pred_noise": (1 - alpha_bar).sqrt() / variance,
            "pred_x0": alpha_bar.sqrt() / 4 / variance,
            "pred_v": (alpha_bar * (1 - alpha_bar)).sqrt() * 0.75 / variance,
        }[self.objective]
        return scale.to(x.dtype) * x + self.share * self.random(x, t, x_self_cond)


class Halved(torch.nn.Module):
    """A Unet with weights in bfloat16; the library's own alone do not take the float32 that it feeds them."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.net = unet().bfloat16()
        self.net.time_mlp[0].register_forward_hook(lambda module, args, embedding: embedding.bfloat16())

    def forward(self, x, t, x_self_cond=None):
        return self.net(x.bfloat16(), t)


def calm(objective="pred_noise", self_condition=False, share=0.1, **kwargs) -> GaussianDiffusion:
    """A diffusion with a Denoiser."""
    made = diffusion(unet(self_condition), objective=objective, **kwargs)
    made.model = Denoiser(made.alphas_cumprod, objective, self_condition, share).eval()
    return made


def both(theirs, call, seed=0, **options):
    """What `call` gives for the original and for the fast one, each after torch.manual_seed; and both end states."""
    results, states = [], []
    for one in (theirs, accelerate(theirs, **options)):
        torch.manual_seed(seed)
        results.append(call(one))
        states.append(torch.get_rng_state())
    return results, states


def difference(theirs, call, **options) -> float:
    """The largest difference; asserts that both leave torch's generator in one state."""
    (a, b), states = both(theirs, call, **options)
    assert torch.equal(*states)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float32
    return (a - b).abs().max().item()
