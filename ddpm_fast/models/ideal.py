"""The best possible denoiser of a finite data set, in closed form: the oracle of the tests, without training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm_fast.config import PREDICTION_TYPES
from ddpm_fast.validate import one_of


class IdealDenoiser(nn.Module):
    """A network model(x, t) for data that are exactly the rows of `data`, drawn with equal probability.

    The least squares prediction of x_0 is the posterior mean

        E[x_0 | x_t] = sum_i w_i x_i,   w = softmax_i(-|x_t - sqrt(alpha_bar_t) x_i|^2 / (2 (1 - alpha_bar_t)))

    since x_t given x_0 is Gaussian (Ho et al. 2020, eq. 4). Sampling with this network returns rows of `data`.

    Args:
        data: The data set, [N, C, ...].
        alphas_cumprod: alpha_bar of every timestep, [T], each below 1.
        prediction_type: Meaning of the output: "epsilon", "sample" or "v_prediction".
    """

    data: Tensor
    alphas_cumprod: Tensor

    def __init__(
        self, data: Tensor, alphas_cumprod: Tensor | Sequence[float], prediction_type: str = "epsilon"
    ) -> None:
        super().__init__()
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        self.prediction_type = prediction_type
        # float64, because only the differences of the exponents count, which are in the millions near t = 0.
        self.register_buffer("data", data.double())
        self.register_buffer("alphas_cumprod", torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu"))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction for x [B, C, ...] at timesteps t int64 [B], in the dtype of x."""
        x_t = x.double()
        alpha_bar = self.alphas_cumprod[t].view(-1, *(1,) * (x.dim() - 1))
        x_0 = torch.einsum("bn,n...->b...", self.weights(x_t, t), self.data)
        if self.prediction_type == "sample":
            output = x_0
        else:
            epsilon = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
            output = epsilon
            if self.prediction_type == "v_prediction":
                output = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
        return output.to(x.dtype)

    def weights(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior probability of every row of the data given x_t: float64 [B, N]."""
        alpha_bar = self.alphas_cumprod[t][:, None]
        flat = self.data.flatten(1)
        # |x - s x_i|^2 without |x|^2, which is the same for all rows
        cross = alpha_bar.sqrt() * (x.double().flatten(1) @ flat.T)
        return ((cross - alpha_bar * flat.square().sum(1) / 2) / (1 - alpha_bar)).softmax(dim=1)
