"""Small networks with known behaviour, for the tests."""

import torch
from torch import Tensor, nn


class Wavy(nn.Module):
    """A smooth bounded function of (x, t) with fixed random weights: any rank, `out` channels, float32 or float64."""

    def __init__(self, channels: int, out_channels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels * 100 + out_channels)
        draw = torch.randn(2, out_channels, channels, generator=generator, dtype=torch.float64)
        self.mix = nn.Parameter(draw[0].to(dtype), requires_grad=False)
        self.phase = nn.Parameter(draw[1].to(dtype), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]
        mixed = torch.einsum("oc,bcn->bon", self.mix, flat) + self.phase.sum(1)[:, None]
        wave = torch.sin(mixed + (t.to(x.dtype) / 100)[:, None, None])
        return wave.view(len(x), -1, *x.shape[2:]) + shift


class Gaussian(nn.Module):
    """The optimal noise prediction for data ~ N(mean, covariance), linear in x (a closed form).

    E[x_0 | x_t] = m + sqrt(ab) C (ab C + (1 - ab) I)^-1 (x_t - sqrt(ab) m).
    """

    def __init__(self, mean: Tensor, covariance: Tensor, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.mean, self.covariance, self.alphas_cumprod = mean.double(), covariance.double(), alphas_cumprod.double()
        self.calls = 0

    def gain(self, t: int) -> tuple[Tensor, Tensor]:
        """(G, g) with E[x_0 | x_t] = G x_t + g, float64."""
        alpha_bar = self.alphas_cumprod[t]
        spread = alpha_bar * self.covariance + (1 - alpha_bar) * torch.eye(len(self.mean), dtype=torch.float64)
        gain = alpha_bar.sqrt() * self.covariance @ torch.linalg.inv(spread)
        return gain, self.mean - alpha_bar.sqrt() * gain @ self.mean

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        gain, offset = self.gain(int(t[0]))
        alpha_bar = self.alphas_cumprod[int(t[0])]
        x_0 = x.double() @ gain.T + offset
        return ((x.double() - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()).to(x.dtype)
