"""The losses of training: squared errors of any prediction, the variational bound, or both together."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.likelihood import gaussian_kl, log_decoder
from ddpm_fast.table import build_table, posterior_variance
from ddpm_fast.validate import one_of, within

LOSSES = ("mse", "vlb", "hybrid")
HYBRID_WEIGHT = 1e-3  # weight of the bound (Nichol & Dhariwal 2021, section 3.1)


class Loss:
    """The loss of a batch, each sample at its own timestep.

    Args:
        diffusion: Schedule, prediction type and variance of the network.
        kind: "mse" is the squared error of the prediction (epsilon: Ho et al. 2020, eq. 14). "vlb" is the variational
            bound in bits per dimension: one of its T terms for each sample, times T. "hybrid" is the squared error plus
            0.001 of the bound, which then trains the variance alone (Nichol & Dhariwal 2021, eq. 16); it needs a
            learned variance.
        min_snr_gamma: Gamma of the weight min(SNR, gamma) of the squared error of x_0, for any prediction, with SNR =
            alpha_bar / (1 - alpha_bar) (Hang et al. 2023, with gamma = 5). None means no weight.
        device: Device of the batches.

    Raises:
        ValueError: "hybrid" without a learned variance, or "mse" with a learned variance, which it would not train.
    """

    def __init__(
        self,
        diffusion: SamplerConfig,
        kind: str = "mse",
        min_snr_gamma: float | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        one_of("loss", kind, LOSSES)
        learned = diffusion.variance_type in ("learned", "learned_range")
        if kind == "hybrid" and not learned:
            raise ValueError(f"loss='hybrid' teaches a learned variance, not variance_type={diffusion.variance_type!r}")
        if kind == "mse" and learned:
            raise ValueError(f"loss='mse' does not teach variance_type={diffusion.variance_type!r}: take 'hybrid'")
        if min_snr_gamma is not None:
            within("min_snr_gamma", min_snr_gamma, 0, math.inf, "()")
        if min_snr_gamma is not None and kind == "vlb":
            raise ValueError("min_snr_gamma weighs the squared error, of which loss='vlb' has none")
        self.diffusion, self.kind, self.learned = diffusion, kind, learned
        self.steps = diffusion.num_train_timesteps
        chain = replace(
            diffusion, num_inference_steps=None, timesteps=None, steps_offset=0, timestep_spacing="leading",
            previous_timestep="spacing", set_alpha_to_one=True,
        )  # fmt: skip
        table = build_table(chain)
        alpha_bar = torch.from_numpy(chain.alphas_cumprod())
        before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alpha_bar[:-1]])
        beta_tilde = torch.from_numpy(posterior_variance(alpha_bar.numpy(), before.numpy()))
        beta_tilde[0] = beta_tilde[min(1, self.steps - 1)]  # the decoder's beta_tilde would be zero
        beta = 1 - alpha_bar / before
        fixed = beta if diffusion.variance_type.startswith("fixed_large") else beta_tilde
        low = beta_tilde.log() if diffusion.variance_type == "learned_range" else -torch.ones_like(beta)
        high = beta.log() if diffusion.variance_type == "learned_range" else torch.ones_like(beta)
        by_t = {name: torch.from_numpy(getattr(table, name)).flip(0) for name in ("a", "b", "c_x0", "c_x")}
        snr = alpha_bar / (1 - alpha_bar)
        weight = torch.ones_like(snr)
        if min_snr_gamma is not None:
            of_x0 = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
            weight = snr.clamp(max=min_snr_gamma) / of_x0[diffusion.prediction_type]
        columns = {
            **by_t, "signal": alpha_bar.sqrt(), "deviation": (1 - alpha_bar).sqrt(), "weight": weight,
            "log_beta_tilde": beta_tilde.log(), "log_fixed": fixed.log(), "log_min": low, "log_max": high,
        }  # fmt: skip
        self._columns = {name: column.float().to(device) for name, column in columns.items()}

    def __call__(self, output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of every sample: float32 [B].

        Args:
            output: Output of the network at (x_t, t): [B, C, ...], or [B, 2C, ...] with a learned variance.
            x_0, x_t, noise: float32 [B, C, ...], with x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.
            t: int64 [B].
        """
        channels = x_0.shape[1]
        prediction, v = output[:, :channels].float(), output[:, channels:].float()
        if self.kind == "vlb":
            return self.steps * self._bits(prediction, v, x_0, x_t, t)
        error = (prediction - self.target(x_0, noise, t)).square().flatten(1).mean(1)
        error = error * self._columns["weight"][t]
        if self.kind == "hybrid":
            error = error + HYBRID_WEIGHT * self.steps * self._bits(prediction.detach(), v, x_0, x_t, t)
        return error

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the network: epsilon, x_0 or v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0."""
        if self.diffusion.prediction_type == "epsilon":
            return noise
        if self.diffusion.prediction_type == "sample":
            return x_0
        return self._at("signal", t, x_0) * noise - self._at("deviation", t, x_0) * x_0

    def _bits(self, prediction: Tensor, v: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return L_{t-1} of every sample in bits per dimension, or the decoder's term at t = 0. x0 is not clipped."""
        x0 = self._at("a", t, x_t) * x_t + self._at("b", t, x_t) * prediction
        if self.learned:
            share = (v + 1) / 2
            log_variance = share * self._at("log_max", t, x_t) + (1 - share) * self._at("log_min", t, x_t)
        else:
            log_variance = self._at("log_fixed", t, x_t).expand_as(x_t)
        c_x0, log_true = self._at("c_x0", t, x_t), self._at("log_beta_tilde", t, x_t)
        kl = gaussian_kl(c_x0 * (x_0 - x0), log_true, log_variance)
        mean = c_x0 * x0 + self._at("c_x", t, x_t) * x_t
        decoder = -log_decoder(x_0, mean, log_variance)
        first = (t == 0).view(-1, *(1,) * (x_t.dim() - 1))
        return torch.where(first, decoder, kl).flatten(1).mean(1) / math.log(2)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the column at timesteps t, shaped to broadcast with `like`."""
        return self._columns[name][t].view(-1, *(1,) * (like.dim() - 1))
