"""Walks whose law is known in closed form or by quadrature: what speculative samples are tested against."""

import functools
import math

import numpy as np
import torch
from scipy import stats

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.speculation.loop import SpeculativeLoop
from ddpm_fast.speculation.windows import WindowPlan
from ddpm_fast.table import Clipping, build_table

CPU = torch.device("cpu")
# Every row with noise: what a last, plain step does to a broken law would hide part of it.
CONFIG = SamplerConfig(
    num_train_timesteps=60, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", noise_free="t_zero",
    timesteps=list(range(59, 0, -1)), clip_sample=False,
)  # fmt: skip
TABLE = build_table(CONFIG)
ALPHA_BAR = torch.from_numpy(CONFIG.alphas_cumprod())


class Mixture:
    """The best noise prediction for points of a few Gaussians, each coordinate by itself: x [B, 1, n].

    Args:
        centres, weights: of the Gaussians;
        deviation: of each.
    """

    def __init__(self, centres=(-0.9, 0.2, 1.0), weights=(0.3, 0.5, 0.2), deviation=0.15, alpha_bar=ALPHA_BAR):
        self.centres = torch.tensor(centres, dtype=torch.float64)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.deviation, self.alpha_bar = deviation, alpha_bar
        self.calls = self.rows = 0

    def origin(self, x, alpha_bar):
        """E[x_0 | x_t]."""
        signal, noise = alpha_bar.sqrt(), 1 - alpha_bar
        variance = alpha_bar * self.deviation**2 + noise
        apart = x[..., None] - signal[..., None] * self.centres
        share = (self.log_weights - apart.square() / (2 * variance[..., None])).softmax(-1)
        each = self.centres + (signal * self.deviation**2 / variance)[..., None] * apart
        return (share * each).sum(-1)

    def __call__(self, x, t):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        alpha_bar = self.alpha_bar[t].view(-1, *(1,) * (x.dim() - 1))
        wide = x.double()
        return ((wide - alpha_bar.sqrt() * self.origin(wide, alpha_bar)) / (1 - alpha_bar).sqrt()).to(x.dtype)


class Gaussian:
    """The best noise prediction for N(mean, covariance) of n coordinates: x [B, 1, n]."""

    def __init__(self, size=8, alpha_bar=ALPHA_BAR):
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        self.covariance = root @ root.T * 0.6
        self.mean = torch.randn(size, generator=generator, dtype=torch.float64) * 0.5
        self.alpha_bar, self.eye = alpha_bar, torch.eye(size, dtype=torch.float64)

    def response(self, alpha_bar):
        """E[x_0 | x_t] = matrix x_t + offset."""
        signal = alpha_bar**0.5
        matrix = signal * self.covariance @ torch.linalg.inv(alpha_bar * self.covariance + (1 - alpha_bar) * self.eye)
        return matrix, self.mean - signal * matrix @ self.mean

    @functools.cached_property
    def responses(self):
        found = [self.response(float(each)) for each in self.alpha_bar]
        return torch.stack([matrix for matrix, _ in found]), torch.stack([offset for _, offset in found])

    def __call__(self, x, t):
        matrices, offsets = (each[t] for each in self.responses)
        wide = x.double()
        origin = torch.einsum("bij,bcj->bci", matrices, wide) + offsets[:, None]
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1)
        return ((wide - alpha_bar.sqrt() * origin) / (1 - alpha_bar).sqrt()).to(x.dtype)

    def law(self, table=TABLE):
        """Mean and covariance of the walk's end, by recursion."""
        mean, covariance = torch.zeros_like(self.mean), self.eye.clone()
        for row in range(len(table)):
            matrix, offset = self.response(float(self.alpha_bar[table.timestep[row]]))
            step = table.c_x0[row] * matrix + table.c_x[row] * self.eye
            mean = step @ mean + table.c_x0[row] * offset
            covariance = step @ covariance @ step.T + table.sigma[row] ** 2 * self.eye
        return mean, covariance


@functools.cache
def mixture_law(points=1501, reach=7.0):
    """Grid and distribution function of the walk's end for the mixture, in one dimension, by quadrature."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    model, width = Mixture(), grid[1] - grid[0]
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    for row in range(len(TABLE)):
        alpha_bar = ALPHA_BAR[TABLE.timestep[row]].expand(points)
        mean = TABLE.c_x0[row] * model.origin(grid, alpha_bar) + TABLE.c_x[row] * grid
        sigma = TABLE.sigma[row]
        kernel = torch.exp(-((grid[:, None] - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        density = kernel @ density * width
    return grid.numpy(), (density.cumsum(0) - density / 2).numpy() * float(width)


def walk(model, batch, size, windows, table=TABLE, spoil=None, seed=0, loops=None):
    """`batch` samples of `size` coordinates, and what the walk did; `spoil(loop)` may break it."""
    shape = (batch, 1, size)
    call, plain = Call.of(model, shape, device=CPU), Execution(verify=False)  # no calls but those of the rounds
    loop = SpeculativeLoop(call, table, Clipping(), WindowPlan.of(windows), execution=plain)
    if spoil is not None:
        spoil(loop)
    noise = PhiloxNoise(list(range(seed, seed + batch)), shape, table, CPU, "torch")
    return loop.run(noise, progress=False)[:, 0].double(), loop.speculation


def mixture_p_value(x):
    """Kolmogorov-Smirnov against the mixture's law, all coordinates together (they are independent)."""
    grid, distribution = mixture_law()
    return stats.kstest(x.flatten().numpy(), lambda values: np.interp(values, grid, distribution)).pvalue


def gaussian_p_values(x, law):
    """Kolmogorov-Smirnov of every whitened coordinate and of the squared length, and of the covariance's errors."""
    mean, covariance = law
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).T, upper=False).T
    count, size = white.shape
    found = [stats.kstest(column.numpy(), "norm").pvalue for column in white.T]
    found.append(stats.kstest(white.square().sum(1).numpy(), "chi2", args=(size,)).pvalue)
    # Products of different coordinates have variance 1, squares less one have 2.
    errors = (white.T @ white / count - torch.eye(size, dtype=torch.float64)) * count**0.5
    lower = errors[torch.tril_indices(size, size, -1).unbind()]
    statistic = float(lower.square().sum() + (errors.diagonal().square() / 2).sum())
    found.append(stats.chi2.sf(statistic, size * (size + 1) // 2))
    return found
