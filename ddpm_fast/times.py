"""Networks that take another time than the integer timestep: scaled, continuous, or a log signal-to-noise ratio.

    sampler = Sampler(Retimed(network, log_snr_times(config.alphas_cumprod())), shape, config=config)

A sampler's own timesteps stay integers t = 0 … T - 1. Only the network's argument changes.
"""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast.schedules import Array
from ddpm_fast.validate import whole, within


class Retimed(nn.Module):
    """A wrapper that calls a network with times[t] instead of t.

    Args:
        model: The network, called as model(x, times[t], **kwargs) with times in float32 [B].
        times: One time a training timestep, [T]: from `scaled_times`, `continuous_times`, `log_snr_times`, or others.

    Raises:
        TypeError: The model is no module.
        ValueError: The times are no finite vector.
    """

    times: Tensor

    def __init__(self, model: nn.Module, times: Array | Tensor) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        times = torch.as_tensor(times, dtype=torch.float32, device="cpu")
        if times.dim() != 1 or len(times) == 0 or not torch.isfinite(times).all():
            raise ValueError(f"times must be finite numbers [T], one a timestep, got shape {tuple(times.shape)}")
        self.model = model
        device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
        # Stored as bits, because module.half() would round floats.
        self.register_buffer("times", times.to(device).view(torch.int32), persistent=False)
        self.train(model.training)

    def forward(self, x: Tensor, t: Tensor, **kwargs: object) -> object:
        """Return the network's output at x [B, C, ...] and timesteps t, int64 [B]. Keywords go to the network."""
        return self.model(x, self.times[t].view(torch.float32), **kwargs)


def scaled_times(num_train_timesteps: int, scale: float) -> Array:
    """Return scale t: float64 [T]. 1000 / T is the scale of rescale_timesteps in improved- and guided-diffusion."""
    scale = within("scale", scale, -np.inf, np.inf, "()")
    return scale * np.arange(whole("num_train_timesteps", num_train_timesteps, 1), dtype=np.float64)


def continuous_times(num_train_timesteps: int, first: float = 0.0) -> Array:
    """Return (t + first) / T: float64 [T]. The times lie in [0, 1) for first = 0 and in (0, 1] for first = 1."""
    steps, first = whole("num_train_timesteps", num_train_timesteps, 1), within("first", first, 0, 1)
    return np.linspace(first, first + steps - 1, steps) / steps


def log_snr_times(alphas_cumprod: Array | Tensor) -> Array:
    """Return log(alpha_bar / (1 - alpha_bar)), the logarithm of the signal-to-noise ratio (Kingma et al. 2021, eq. 3).

    Args:
        alphas_cumprod: alpha_bar of every training timestep, [T], inside (0, 1).

    Returns:
        float64 [T], falling.
    """
    alpha_bar = np.asarray(alphas_cumprod, np.float64)
    if alpha_bar.ndim != 1 or not ((alpha_bar > 0) & (alpha_bar < 1)).all():
        raise ValueError("alphas_cumprod must lie inside (0, 1): where it is 0 or 1 the log-SNR is infinite")
    return np.log(alpha_bar) - np.log1p(-alpha_bar)
