"""Sample from any torch.nn.Module, and compare with a plain loop.

    python examples/with_your_own_network.py

The plain loop is algorithm 2 of the DDPM paper (Ho et al. 2020). The network takes times in [0, 1].
"""

import time

import torch
from torch import nn

from ddpm_fast.config import SamplerConfig
from ddpm_fast.sample import Sampler
from ddpm_fast.times import Retimed, continuous_times

SHAPE = (4, 3, 16, 16)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Network(nn.Module):
    """A network that predicts the noise, with random weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x, time):
        return self.layers(torch.cat([x, time.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], dim=1))


@torch.no_grad()
def plain_loop(network, generator):
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    x = torch.randn(SHAPE, generator=generator, device=device)
    for t in reversed(range(1000)):
        previous = alpha_bar[t - 1] if t else torch.ones(())
        epsilon = network(x, torch.full(SHAPE[:1], t / 1000, device=device))
        x0 = ((x - (1 - alpha_bar[t]).sqrt().float() * epsilon) / alpha_bar[t].sqrt().float()).clamp(-1, 1)
        mean = (previous.sqrt() * beta[t] / (1 - alpha_bar[t])).float() * x0
        mean += ((1 - beta[t]).sqrt() * (1 - previous) / (1 - alpha_bar[t])).float() * x
        variance = (1 - previous) / (1 - alpha_bar[t]) * beta[t]
        z = torch.randn(SHAPE, generator=generator, device=device) if t else torch.zeros(SHAPE, device=device)
        x = mean + variance.sqrt().float() * z
    return x


torch.manual_seed(0)
network = Network().eval().to(device)
sampler = Sampler(Retimed(network, continuous_times(1000)), SHAPE, config=SamplerConfig())  # instead of the loop

began = time.perf_counter()
before = plain_loop(network, torch.Generator(device).manual_seed(0)).cpu()
seconds_before = time.perf_counter() - began

began = time.perf_counter()
after = sampler(generator=torch.Generator(device).manual_seed(0)).cpu()  # or seeds=range(4): noise in the kernel
seconds_after = time.perf_counter() - began

print(f"1000 steps: {seconds_before:.1f} s before, {seconds_after:.1f} s after")
print(f"largest difference of the images, on [-1, 1]: {(before - after).abs().max():.1e}")
