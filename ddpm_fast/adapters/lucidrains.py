"""lucidrains' denoising-diffusion-pytorch: its diffusion objects on our sampling loop.

The library draws all noise from torch's global generator, in float32, and so does an accelerated object under a global
seed. The table holds the numbers of the library's buffers, which are rounded to float32.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, LearnedGaussianDiffusion
from torch import Tensor

from ddpm_fast.adapters import unsupported
from ddpm_fast.adapters.runner import Accelerated, Options, Runner, adopt
from ddpm_fast.engine.call import Call
from ddpm_fast.models.checkpoint import load_weights, plain_names, read_weights_only
from ddpm_fast.schedules import Array
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.timesteps import Timesteps
from ddpm_fast.validate import whole

Kwargs = dict[str, Any] | None

_CLIPPED = Clipping(limit=1.0)

# Module → the reason why its diffusions cannot be accelerated.
_REFUSED = {
    "continuous_time_gaussian_diffusion": "its network is told the log-SNR of a continuous time",
    "v_param_continuous_time_gaussian_diffusion": "its network is told the log-SNR of a continuous time",
    "simple_diffusion": "its network is told the log-SNR of a continuous time",
    "weighted_objective_gaussian_diffusion": "its network mixes two predictions with weights that it learns",
    "elucidated_diffusion": "it is no DDPM: its steps are Heun's, on Karras' noise levels",
    "classifier_free_guidance": "its network guides itself: its forward_with_cond_scale can be given to a Sampler",
    "repaint": "its walk goes back and forth",
    "guided_diffusion": "its guidance needs gradients of a function of the caller in every step",
}
_SAMPLING = (
    "p_sample", "p_sample_loop", "ddim_sample", "sample", "interpolate", "model_predictions", "p_mean_variance",
    "q_posterior", "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start",
)  # fmt: skip


def accelerate(obj: Any, options: Options) -> Any:
    """Return the fast diffusion for `obj`; see `ddpm_fast.accelerate`."""
    for base in type(obj).__mro__:
        package, _, module = base.__module__.partition(".")
        if package == "denoising_diffusion_pytorch" and module in _REFUSED and "Diffusion" in base.__name__:
            raise TypeError(f"{module}.{base.__name__} is not supported: {_REFUSED[module]}")
    classes = {LearnedGaussianDiffusion: _FastLearned, GaussianDiffusion: _Fast2D, GaussianDiffusion1D: _Fast1D}
    for stock, fast in classes.items():
        if isinstance(obj, stock):
            kind: Any = type(obj)
            for name in _SAMPLING:
                own = getattr(kind, name) not in (getattr(stock, name), getattr(fast, name, None))
                if own or name in vars(obj):
                    raise TypeError(f"{kind.__name__} has a {name} of its own, which would be lost: not accelerated")
            return adopt(obj, kind if issubclass(kind, fast) else _joined(fast, kind), _runner=Runner(options))
    raise TypeError(unsupported(obj, "it is no diffusion that is known"))


@functools.cache
def _joined(fast: Any, kind: Any) -> Any:
    return type(f"Fast{kind.__name__}", (fast, kind), {"__module__": __name__})


def _blank(fast: Any, kind: Any) -> Any:
    """Return an instance without state, for pickle: a class made on the fly cannot be found by name."""
    cls = _joined(fast, kind)
    return cls.__new__(cls)


def ddim_times(diffusion: Any) -> Timesteps:
    """Return the timesteps of ddim_sample, descending, followed by -1."""
    times = torch.linspace(
        -1, diffusion.num_timesteps - 1, diffusion.sampling_timesteps + 1, dtype=torch.float32, device="cpu"
    )
    return times.int().numpy()[::-1].astype(np.int64)


def load_trainer_checkpoint(path: str | Path, diffusion: Any, ema: bool = True) -> Any:
    """Read the weights of a Trainer's `model-N.pt` into `diffusion` and return it.

    Args:
        path: Path of the file, which is read with weights_only=True.
        diffusion: A diffusion built with the arguments of the training, accelerated or not.
        ema: Whether to take the averaged weights, as the Trainer does for its samples.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of a Trainer, or of another diffusion; nothing is loaded then.
    """
    state = read_weights_only(path, "checkpoint of a Trainer", diffusion.device)
    weights = state.get("ema" if ema else "model") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{path} is no checkpoint of a Trainer: it has no {'ema' if ema else 'model'!r}")
    if ema:
        weights = {key.removeprefix("ema_model."): w for key, w in weights.items() if key.startswith("ema_model.")}
    message = f"{path} is of another diffusion"
    weights = plain_names(weights, message)
    # The weights of the loss follow from the arguments alone, are read by the loss alone, and had another name once.
    weights = {key: value for key, value in weights.items() if key not in ("loss_weight", "p2_loss_weight")}
    if "loss_weight" in (own := diffusion.state_dict()):
        weights["loss_weight"] = own["loss_weight"]
    load_weights(diffusion, weights, message)
    return diffusion


class _SelfConditioned:
    """A network that is called as the library calls it, with the last x0 prediction where there is one.

    Attributes:
        x0: The last x0 prediction, zeros at first, for self-conditioned networks; None for others.
    """

    def __init__(self, model: Callable[..., Tensor], keyword: bool) -> None:
        self.model = model
        self.keyword = keyword
        self.x0: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        last = None if self.x0 is None else self.x0.to(x.dtype)
        if not self.keyword:
            return self.model(x, t, last, **kwargs)
        return self.model(x, t, **kwargs) if last is None else self.model(x, t, x_self_cond=last, **kwargs)


class _FastDiffusion(Accelerated):
    """A base of the fast diffusions in one and two dimensions: the tables and one sampling loop."""

    _keyword: ClassVar[bool] = False  # x_self_cond is passed by name, and only where there is one
    _rederived: ClassVar[bool] = True  # DDIM's direction comes from the clipped x0 prediction
    _learned: ClassVar[bool] = False

    if TYPE_CHECKING:  # all other attributes are the library's

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, self.__dict__

    def _column(self, name: str, t: Timesteps) -> Array:
        column: Array = getattr(self, name).double().cpu().numpy()[t]
        return column

    def _x0_columns(self, t: Timesteps) -> dict[str, Array]:
        objective = "pred_noise" if self._learned else self.objective
        if objective == "pred_x0":
            return {"b": np.ones(len(t))}
        a, b = {
            "pred_noise": ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
            "pred_v": ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        }[objective]
        return {"a": self._column(a, t), "b": -self._column(b, t)}

    def _ddpm_table(self, steps: int) -> StepTable:
        """Return the rows steps - 1, …, 0 of p_sample."""
        t = np.arange(steps)[::-1].copy()
        c_x0, c_x = self._column("posterior_mean_coef1", t), self._column("posterior_mean_coef2", t)
        log_variance = self._column("posterior_log_variance_clipped", t)
        columns = {**self._x0_columns(t), "c_x0": c_x0, "c_x": c_x, "sigma": np.exp(0.5 * log_variance) * (t > 0)}
        if self._learned:
            columns |= {"sigma": 1.0 * (t > 0), "log_min": log_variance, "log_max": np.log(self._column("betas", t))}
        return StepTable.of(t, columns, draws=t > 0, learned=self._learned, doubled=self._learned)

    def _ddim_table(self) -> StepTable:
        """Return the rows of ddim_sample (Song et al. 2021, eq. 12); the last row returns the x0 prediction."""
        times = ddim_times(self)
        t, s = times[:-1], times[1:]
        alpha_bars, eta = self.alphas_cumprod.cpu().numpy(), self.ddim_sampling_eta
        alpha_bar, alpha_bar_s = alpha_bars[t], np.where(s >= 0, alpha_bars[s], np.float32(1))
        sigma = eta * np.sqrt((1 - alpha_bar / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar))
        rest = 1 - alpha_bar_s - sigma**2
        if not rest.min() > -1e-6:
            raise ValueError(f"ddim_sampling_eta must leave room for the image: sigma^2 > 1 - alpha_bar for {eta!r}")
        direction = np.sqrt(np.maximum(rest, 0)).astype(np.float64)
        root = np.sqrt(alpha_bar_s).astype(np.float64)
        columns = {**self._x0_columns(t), "c_x0": root, "sigma": sigma}
        if self._rederived or self.objective != "pred_noise":
            direction /= self._column("sqrt_recipm1_alphas_cumprod", t)
            columns["c_x0"] = root - direction
            columns["c_x"] = direction * self._column("sqrt_recip_alphas_cumprod", t)
        else:
            columns["c_out"] = direction
        return StepTable.of(t, columns, draws=np.asarray(s >= 0))

    def _run(
        self,
        shape: Sequence[int],
        table: StepTable,
        clipping: Clipping = _CLIPPED,
        kwargs: Kwargs = None,
        *,
        x_T: Tensor | None = None,
        keep: bool = False,
    ) -> list[Tensor]:
        """Run from x_T to x_0 and return both; with `keep`, also all states between them."""
        shape = tuple(whole("every size in shape", size, 1) for size in shape)
        if len(shape) < 2:
            raise ValueError(f"shape must be (batch, channels, ...), got {shape}")
        if not torch.isfinite(table.coefficients()).all():
            raise ValueError("the steps hold infinities: alpha_bar is 0 at some timestep, as in 20 linear ones")
        conditioned = bool(self.self_condition)
        if conditioned and "x_self_cond" in (kwargs or {}):
            raise ValueError("x_self_cond comes from the walk itself: leave it out of model_forward_kwargs")
        label = "sampling loop time step" if x_T is None else "interpolation sample time step"
        call = Call.of(
            _SelfConditioned(self.model, self._keyword or self._learned),
            shape,
            model_kwargs=kwargs,
            device=self.device,
            dtype=next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32),
            module=self.model,
        )
        with self._runner.alone() as runner:
            loop = runner.loop(
                call,
                table,
                clipping,
                owner=(self.model, conditioned),
                keep_x0=conditioned,
                inference_mode=not self._keyword,  # as the library does, in two dimensions
                hoistable=not conditioned,
                watched=keep,
            )
            if conditioned:
                cast("_SelfConditioned", loop.call.model).x0 = loop.x0
            noise = runner.noise(None, loop)
            states = [noise.x_T() if x_T is None else x_T]
            for done in loop.steps(noise, states[0], every_step=keep, progress=label):
                if keep or done == len(loop.table):
                    states.append(loop.x.clone())
            return states

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """Noise two images to level t, mix them, (1 - lam) x1 + lam x2, and denoise.

        The result is not unnormalised, as in the library.
        """
        t = self.num_timesteps - 1 if t is None else whole("t", t, 0, self.num_timesteps - 1)
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        level = torch.full((len(x1),), t, device=x1.device, dtype=torch.int64)
        noised1, noised2 = self.q_sample(x1, t=level), self.q_sample(x2, t=level)
        mixed = (1 - lam) * noised1 + lam * noised2
        return self._run(x1.shape, self._ddpm_table(t), x_T=mixed)[-1] if t > 0 else mixed


class _Fast2D(_FastDiffusion):
    """A GaussianDiffusion on our sampling loop."""

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """Draw images; with return_all_timesteps return [B, steps + 1, C, H, W], x_T first."""
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (whole("batch_size", batch_size, 1), self.channels, *self.image_size)
        return loop(shape, return_all_timesteps=return_all_timesteps)

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Run through all timesteps."""
        return self._images(shape, self._ddpm_table(self.num_timesteps), return_all_timesteps)

    @torch.no_grad()
    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Run through sampling_timesteps of them by DDIM."""
        return self._images(shape, self._ddim_table(), return_all_timesteps)

    def _images(self, shape: Sequence[int], table: StepTable, return_all: bool) -> Tensor:
        states = self._run(shape, table, keep=return_all)
        images: Tensor = self.unnormalize(torch.stack(states, dim=1) if return_all else states[-1])
        return images


class _FastLearned(_Fast2D):
    """A LearnedGaussianDiffusion on our sampling loop."""

    _learned = True

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Raise NotImplementedError; the library's own method ends in a NameError."""
        raise NotImplementedError(
            "LearnedGaussianDiffusion cannot sample by DDIM, there or here: sampling_timesteps must be timesteps"
        )


class _Fast1D(_FastDiffusion):
    """A GaussianDiffusion1D on our sampling loop."""

    _keyword = True
    _rederived = False

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_noise: bool = False, model_forward_kwargs: Kwargs = None) -> Any:
        """Draw sequences [B, C, N], or [B, N, C] with channel_first=False; with return_noise also x_T."""
        sizes = (self.channels, self.seq_length) if self.channel_first else (self.seq_length, self.channels)
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (whole("batch_size", batch_size, 1), *sizes)
        return loop(shape, return_noise=return_noise, model_forward_kwargs=model_forward_kwargs)

    @torch.no_grad()
    def p_sample_loop(
        self, shape: Sequence[int], return_noise: bool = False, model_forward_kwargs: Kwargs = None
    ) -> Any:
        """Run through all timesteps."""
        x_T, x_0 = self._run(shape, self._ddpm_table(self.num_timesteps), kwargs=model_forward_kwargs)
        return self._sequences(x_T, x_0, return_noise)

    @torch.no_grad()
    def ddim_sample(
        self,
        shape: Sequence[int],
        clip_denoised: bool = True,
        model_forward_kwargs: Kwargs = None,
        return_noise: bool = False,
    ) -> Any:
        """Run through sampling_timesteps of them by DDIM.

        With return_noise the second result is x_T; in the library it is the last draw.
        """
        clipping = _CLIPPED if clip_denoised else Clipping()
        x_T, x_0 = self._run(shape, self._ddim_table(), clipping, model_forward_kwargs)
        return self._sequences(x_T, x_0, return_noise)

    def _sequences(self, x_T: Tensor, x_0: Tensor, return_noise: bool) -> Any:
        return (self.unnormalize(x_0), x_T) if return_noise else self.unnormalize(x_0)
