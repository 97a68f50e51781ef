"""The textbook sampler: "Denoising Diffusion Probabilistic Models" (Ho, Jain & Abbeel 2020) in plain PyTorch.

This module imports nothing of the package, runs in float32 or float64, and is slow. The tests compare everything fast
with it. The equation numbers are the paper's. Timesteps count from 0: beta[0] is the paper's beta_1.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]


class Diffusion:
    """A chain x_0 → x_1 → … → x_T of Gaussian steps with variances `betas`, and its reversal.

    Args:
        betas: Variances of the steps, [T], in any float dtype.
        timesteps: Timestep that the network gets at each step, ascending. None means 0 … T-1.
    """

    def __init__(self, betas: Tensor, timesteps: Sequence[int] | None = None) -> None:
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_bar = torch.cumprod(self.alphas, dim=0)
        self.timesteps = list(range(len(betas))) if timesteps is None else list(timesteps)

    def respaced(self, timesteps: Iterable[int]) -> "Diffusion":
        """Return the chain that visits `timesteps` alone. Its marginals q(x_t | x_0) are the long chain's."""
        kept = sorted(timesteps)
        alphas_bar = self.alphas_bar[kept]
        before = torch.cat([torch.ones(1, dtype=alphas_bar.dtype, device="cpu"), alphas_bar[:-1]])
        return Diffusion(1 - alphas_bar / before, [self.timesteps[t] for t in kept])

    # The forward process

    def q_step(self, x_before: Tensor, t: int, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)   (2)"""
        return torch.sqrt(1 - self.betas[t]) * x_before + torch.sqrt(self.betas[t]) * noise

    def q_sample(self, x_0: Tensor, t: int, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)   (4)"""
        return torch.sqrt(self.alphas_bar[t]) * x_0 + torch.sqrt(1 - self.alphas_bar[t]) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of q(x_{t-1} | x_t, x_0)   (6), (7)"""
        alpha_bar, alpha_bar_before = self.alphas_bar[t], self._alpha_bar_before(t)
        mean = (
            torch.sqrt(alpha_bar_before) * self.betas[t] / (1 - alpha_bar) * x_0
            + torch.sqrt(self.alphas[t]) * (1 - alpha_bar_before) / (1 - alpha_bar) * x_t
        )
        return mean, self._beta_tilde(t)

    # The reverse process

    def predict_x_0(self, x_t: Tensor, t: int, output: Tensor, prediction_type: str = "epsilon") -> Tensor:
        """Return the x_0 that the network's output stands for   (15)

        For v, the output is v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.
        """
        signal, noise = torch.sqrt(self.alphas_bar[t]), torch.sqrt(1 - self.alphas_bar[t])
        if prediction_type == "epsilon":
            return (x_t - noise * output) / signal
        if prediction_type == "v_prediction":
            return signal * x_t - noise * output
        return output

    def p_sample(
        self,
        model: Model,
        x_t: Tensor,
        t: int,
        noise: Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip: float | None = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw x_{t-1} ~ p(x_{t-1} | x_t), one line of Algorithm 2."""
        output = model(x_t, torch.full((len(x_t),), self.timesteps[t], dtype=torch.int64, device="cpu"))
        channels = x_t.shape[1]
        x_0 = self.predict_x_0(x_t, t, output[:, :channels], prediction_type)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        mean, _ = self.q_posterior(x_0, x_t, t)
        if t == 0:
            return mean
        return mean + temperature * torch.sqrt(self.p_variance(t, variance_type, output[:, channels:])) * noise

    def p_variance(self, t: int, variance_type: str, v: Tensor) -> Tensor:
        """Return sigma_t^2: fixed (section 3.2) or learned (Nichol & Dhariwal 2021, eq. 15)."""
        if variance_type in ("fixed_small", "fixed_small_log"):
            return self._beta_tilde(t)
        if variance_type in ("fixed_large", "fixed_large_log"):
            return self.betas[t]
        if variance_type == "learned":
            return torch.exp(v)
        share = (v + 1) / 2
        return torch.exp(share * torch.log(self.betas[t]) + (1 - share) * torch.log(self._beta_tilde(t)))

    def sample(
        self,
        model: Model,
        x_T: Tensor,
        noises: Sequence[Tensor],
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip: float | None = 1.0,
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """Run Algorithm 2 and return [x_{T-1}, …, x_0]. `noises` holds the noise of each step, first step first."""
        x = x_T
        states: list[Tensor] = []
        for t in reversed(range(len(self.betas))):
            noise = noises[len(states)]
            x = self.p_sample(model, x, t, noise, prediction_type, variance_type, clip, temperature)
            states.append(x)
        return states

    def ddim_sample(
        self,
        model: Model,
        x_T: Tensor,
        noises: Sequence[Tensor],
        eta: float = 0.0,
        prediction_type: str = "epsilon",
        clip: float | None = 1.0,
        direction: str = "output",
    ) -> list[Tensor]:
        """Run DDIM (Song, Meng & Ermon 2021, eq. 12) and return the state after every step.

        The direction to x_t comes from the raw "output" or from the clipped "x0".
        """
        x = x_T
        states: list[Tensor] = []
        for t in reversed(range(len(self.betas))):
            output = model(x, torch.full((len(x),), self.timesteps[t], dtype=torch.int64, device="cpu"))
            signal, deviation = torch.sqrt(self.alphas_bar[t]), torch.sqrt(1 - self.alphas_bar[t])
            raw = self.predict_x_0(x, t, output, prediction_type)
            x_0 = raw if clip is None else raw.clamp(-clip, clip)
            epsilon = (x - signal * (x_0 if direction == "x0" else raw)) / deviation
            sigma = eta * torch.sqrt(self._beta_tilde(t))
            before = self._alpha_bar_before(t)
            x = torch.sqrt(before) * x_0 + torch.sqrt((1 - before - sigma**2).clamp(min=0)) * epsilon
            x = x + sigma * noises[len(states)]
            states.append(x)
        return states

    def _alpha_bar_before(self, t: int) -> Tensor:
        """Return alpha_bar of the step before t, 1 for the first step."""
        return self.alphas_bar[t - 1] if t > 0 else torch.ones_like(self.alphas_bar[0])

    def _beta_tilde(self, t: int) -> Tensor:
        """Return beta_tilde_t, the posterior variance   (7)"""
        return (1 - self._alpha_bar_before(t)) / (1 - self.alphas_bar[t]) * self.betas[t]
