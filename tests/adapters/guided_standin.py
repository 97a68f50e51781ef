"""guided-diffusion's objects as plain float64 arithmetic: what the tests accelerate, and what they compare with.

The attributes have the library's names; the walk is written from the papers, from alpha_bar alone, and uses none of
them. Also the cases that are walked here, and were walked by the library for tests/golden/guided_diffusion.npz.
"""

import enum
import hashlib

import numpy as np
import torch

from ddpm_fast.adapters.guided_diffusion import MEANS, VARIANCES, space_timesteps  # noqa: F401  (one of the names)
from ddpm_fast.schedules import linear, squaredcos_cap_v2

ModelMeanType = enum.Enum("ModelMeanType", MEANS)
ModelVarType = enum.Enum("ModelVarType", VARIANCES)
LossType = enum.Enum("LossType", ["MSE"])

SHAPE = (2, 3, 4, 4)


class Process:
    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type=None, rescale_timesteps=False):
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = beta = np.array(betas, np.float64)
        self.num_timesteps = len(beta)
        self.alphas_cumprod = ab = np.cumprod(1 - beta)
        self.alphas_cumprod_prev = ab_s = np.concatenate([[1.0], ab[:-1]])
        self.sqrt_recip_alphas_cumprod = ab**-0.5
        self.sqrt_recipm1_alphas_cumprod = (1 / ab - 1) ** 0.5
        self.posterior_variance = beta * (1 - ab_s) / (1 - ab)
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1]
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = beta * ab_s**0.5 / (1 - ab)
        self.posterior_mean_coef2 = (1 - beta) ** 0.5 * (1 - ab_s) / (1 - ab)

    def told(self, i):
        """What the network is told at row i."""
        t = torch.tensor([self.timestep_map[i] if hasattr(self, "timestep_map") else i] * SHAPE[0])
        steps = getattr(self, "original_num_steps", self.num_timesteps)
        return t.float() * (1000.0 / steps) if self.rescale_timesteps else t

    def walk(self, model, shape, x, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta=None):
        """Draw as the library does, in float32; walk in float64."""
        mean_type, var_type = self.model_mean_type.name, self.model_var_type.name
        kwargs = model_kwargs or {}
        x = (torch.randn(shape) if x is None else x).double()
        for i in reversed(range(self.num_timesteps)):
            ab, ab_s = self.alphas_cumprod[i], self.alphas_cumprod[i - 1] if i else 1.0
            beta, beta_1 = 1 - ab / ab_s, 1 - self.alphas_cumprod[1] / self.alphas_cumprod[0]
            small, small_1 = beta * (1 - ab_s) / (1 - ab), beta_1 * self.betas[0] / (1 - self.alphas_cumprod[1])
            c_x0, c_x = beta * ab_s**0.5 / (1 - ab), (1 - beta) ** 0.5 * (1 - ab_s) / (1 - ab)
            with torch.no_grad():
                output = model(x.float(), self.told(i), **kwargs).double()
                z = torch.randn(shape).double() * (i > 0)
                out, v = output[:, : shape[1]], output[:, shape[1] :]
                x0 = {
                    "EPSILON": lambda x=x, out=out, ab=ab: (x - (1 - ab) ** 0.5 * out) / ab**0.5,
                    "START_X": lambda out=out: out,
                    "PREVIOUS_X": lambda x=x, out=out, c_x=c_x, c_x0=c_x0: (out - c_x * x) / c_x0,
                }[mean_type]()
                x0 = x0 if denoised_fn is None else denoised_fn(x0)
                x0 = x0.clamp(-1, 1) if clip_denoised else x0
                gradient = cond_fn(x.float(), self.told(i), **kwargs).double() if cond_fn else 0.0
                if eta is None:
                    low, high = np.log(small if i else small_1), np.log(beta)
                    variance = {
                        "FIXED_SMALL": lambda small=small: torch.tensor(small),
                        "FIXED_LARGE": lambda beta=beta, i=i, small_1=small_1: torch.tensor(beta if i else small_1),
                        "LEARNED": lambda v=v: v.exp(),
                        "LEARNED_RANGE": lambda v=v, low=low, high=high: (low + (v + 1) / 2 * (high - low)).exp(),
                    }[var_type]()
                    mean = out if mean_type == "PREVIOUS_X" else c_x0 * x0 + c_x * x
                    x = mean + variance * gradient + variance.sqrt() * z
                else:
                    x0 = x0 + (1 - ab) / ab**0.5 * gradient
                    sigma = eta * ((1 - ab_s) / (1 - ab) * beta) ** 0.5
                    noise = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
                    x = ab_s**0.5 * x0 + (1 - ab_s - sigma**2) ** 0.5 * noise + sigma * z
            yield {"sample": x.float(), "pred_xstart": x0.float()}


class GaussianDiffusion(Process):
    """With guided-diffusion's arguments."""

    def p_mean_variance(self, model, x, t):
        raise NotImplementedError

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):  # fmt: skip
        return self.walk(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs)

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        return self.walk(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):  # fmt: skip
        *_, last = self.walk(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return last["sample"]

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        *_, last = self.walk(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return last["sample"]


class ImprovedDiffusion(Process):
    """With improved-diffusion's arguments: without cond_fn."""

    def p_mean_variance(self, model, x, t):
        raise NotImplementedError

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False,
    ):  # fmt: skip
        *_, last = self.walk(model, shape, noise, clip_denoised, denoised_fn, None, model_kwargs)
        return last["sample"]

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False, eta=0.0,
    ):  # fmt: skip
        *_, last = self.walk(model, shape, noise, clip_denoised, denoised_fn, None, model_kwargs, eta)
        return last["sample"]


class SpacedDiffusion(GaussianDiffusion):
    def __init__(self, use_timesteps, **kwargs):
        self.original_num_steps = len(kwargs["betas"])
        self.timestep_map = sorted(use_timesteps)
        kept = np.cumprod(1 - np.asarray(kwargs["betas"]))[self.timestep_map]
        super().__init__(**{**kwargs, "betas": 1 - kept / np.concatenate([[1.0], kept[:-1]])})

    def p_mean_variance(self, model, x, t):
        return super().p_mean_variance(self._wrap_model(model), x, t)

    def _wrap_model(self, model):
        return model


def get_named_beta_schedule(name, steps):
    return linear(steps, 0.1 / steps, 20 / steps) if name == "linear" else squaredcos_cap_v2(steps, 0, 0)


def make(library, case):
    """The diffusion of a case: `library` has the names of this module, or is one of OpenAI's with them."""
    betas = library.get_named_beta_schedule(case["schedule"], case["steps"])
    options = {
        "betas": betas,
        "model_mean_type": library.ModelMeanType[case["mean"]],
        "model_var_type": library.ModelVarType[case["variance"]],
        "loss_type": library.LossType.MSE,
        "rescale_timesteps": case["rescale"],
    }
    if case["respacing"] is None:
        return library.GaussianDiffusion(**options)
    kept = library.space_timesteps(case["steps"], case["respacing"] or [case["steps"]])
    return library.SpacedDiffusion(use_timesteps=kept, **options)


def network(channels):
    """A bounded smooth network that is the same everywhere; y shifts its phase."""

    def call(x, t, y):
        phase = (0.001 * t + y).view(-1, 1, 1, 1)
        return torch.cat([0.8 * torch.sin(1.5 * x + phase), torch.cos(0.7 * x + 2 * phase)], dim=1)[:, :channels]

    return call


def denoised_fn(x0):
    return 0.8 * x0 + 0.1


def cond_fn(x, t, y):
    return 0.5 * torch.cos(x + (0.002 * t - y).view(-1, 1, 1, 1))


def arguments(case):
    """(args, kwargs) of the case's loop."""
    doubled = case["variance"].startswith("LEARNED")
    kwargs = {
        "clip_denoised": case["clip"],
        "model_kwargs": {"y": torch.tensor([0.0, 0.7])},
        "device": "cpu",
        "denoised_fn": denoised_fn if case["denoised"] else None,
    }
    if case["cond"]:
        kwargs["cond_fn"] = cond_fn
    if case["eta"] is not None:
        kwargs["eta"] = case["eta"]
    return (network(6 if doubled else 3), SHAPE), kwargs


def walk(diffusion, case, progressive=False, seed=0):
    """The case's sample, or with `progressive` everything that is yielded."""
    args, kwargs = arguments(case)
    torch.manual_seed(seed)
    name = "p_sample_loop" if case["eta"] is None else "ddim_sample_loop"
    if progressive:
        return [dict(state) for state in getattr(diffusion, f"{name}_progressive")(*args, **kwargs)]
    return getattr(diffusion, name)(*args, **kwargs)


def state_hash():
    """Of the global generator's state."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]
