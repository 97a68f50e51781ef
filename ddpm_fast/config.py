"""The configuration of a sampler: every option that its table depends on, validated once."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np

from ddpm_fast.schedules import BETA_SCHEDULES, Array, betas_from_list, rescale_zero_terminal_snr
from ddpm_fast.timesteps import TIMESTEP_SPACINGS, Timesteps, check_range, explicit
from ddpm_fast.validate import check_names, one_of, whole, within

F = TypeVar("F", bound=Callable[..., Any])

MOST_TIMESTEPS = 10**6  # of a schedule: a table takes about 100 bytes for each
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
SAMPLERS = ("ddpm", "ddim")
DDIM_DIRECTIONS = ("x0", "output")
PREVIOUS_TIMESTEPS = ("spacing", "stride")
NOISE_FREE = ("last_step", "t_zero")


class ConfigOptions(TypedDict, total=False):
    """The fields of `SamplerConfig` as keyword options, for type checkers."""

    num_inference_steps: int | None
    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    trained_betas: Sequence[float] | None
    rescale_betas_zero_snr: bool
    prediction_type: str
    variance_type: str
    sampler: str
    eta: float
    ddim_direction: str
    set_alpha_to_one: bool
    timestep_spacing: str
    steps_offset: int
    timesteps: Sequence[int] | None
    previous_timestep: str
    noise_free: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    temperature: float


@dataclass(frozen=True)
class SamplerConfig:
    """The diffusion that a network was trained on, and the way to sample from it. The names are diffusers'.

    Attributes:
        num_inference_steps: Number of sampling steps, 1 … num_train_timesteps. None takes all of them.
        num_train_timesteps: T, the number of timesteps that the network was trained on.
        beta_schedule: Name of the schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" (betas, as in
            diffusers) or "sigmoid_alpha_bar" (lucidrains' default).
        beta_start, beta_end: End points of linear, scaled_linear and sigmoid, each in (0, 1).
        trained_betas: T betas, used instead of a schedule.
        rescale_betas_zero_snr: True makes the last timestep pure noise (Lin et al. 2023). Not allowed with "epsilon".
        prediction_type: Meaning of the network's output: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: Variance of a DDPM step. "fixed_small" is beta_tilde and "fixed_large" is beta; "fixed_small_log"
            and "fixed_large_log" are the same laws. "learned" takes the second half of the output's channels as log
            sigma^2. "learned_range" interpolates with that half between log beta_tilde at -1 and log beta at +1 (Nichol
            & Dhariwal 2021, eq. 15). Under "ddim" sigma comes from eta, and a second half is discarded.
        sampler: "ddpm" (Ho et al. 2020, algorithm 2) or "ddim" (Song et al. 2021).
        eta: Scale of DDIM's noise, in [0, 1]. 0 is deterministic, 1 adds noise of variance beta_tilde.
        ddim_direction: Source of DDIM's direction to x_t: the network's raw "output" (diffusers' default) or the
            clipped "x0" (diffusers' use_clipped_model_output). With "x0" and eta = 1, DDIM is DDPM.
        set_alpha_to_one: True ends the run at alpha_bar = 1, False ends the run at alpha_bar_0.
        timestep_spacing: Placement of the timesteps: "leading", "trailing" or "linspace".
        steps_offset: Number that is added to the timesteps of "leading".
        timesteps: Explicit timesteps, strictly descending, used instead of a spacing.
        previous_timestep: "spacing" steps to the next timestep of the run. "stride" always steps T // N down
            (diffusers' DDIM).
        noise_free: Step whose sigma is zero: the "last_step", or only the step at t = 0 ("t_zero", diffusers' DDPM).
        clip_sample: True clips the x0 prediction to [-clip_sample_range, clip_sample_range]. Latents need False.
        clip_sample_range: Bound of the clipping, > 0.
        thresholding: True takes dynamic thresholding instead of the fixed clip (Saharia et al. 2022).
        dynamic_thresholding_ratio: Quantile of |x_0| that becomes the bound, in (0, 1].
        sample_max_value: Largest bound of dynamic thresholding, >= 1.
        temperature: Factor of the noise of every step, but not of x_T. 1 is the model's law, 0 follows the mean alone.
    """

    num_inference_steps: int | None = None
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: Sequence[float] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    sampler: str = "ddpm"
    eta: float = 0.0
    ddim_direction: str = "output"
    set_alpha_to_one: bool = True
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    timesteps: Sequence[int] | None = None
    previous_timestep: str = "spacing"
    noise_free: str = "last_step"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("variance_type", self.variance_type, VARIANCE_TYPES)
        one_of("sampler", self.sampler, SAMPLERS)
        one_of("ddim_direction", self.ddim_direction, DDIM_DIRECTIONS)
        one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        one_of("previous_timestep", self.previous_timestep, PREVIOUS_TIMESTEPS)
        one_of("noise_free", self.noise_free, NOISE_FREE)
        for name in ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "thresholding"):
            one_of(name, getattr(self, name), (True, False))
            self._set(name, bool(getattr(self, name)))
        for name, low, high, ends in (
            ("beta_start", 0, 1, "()"),
            ("beta_end", 0, 1, "()"),
            ("eta", 0, 1, "[]"),
            ("temperature", 0, math.inf, "[)"),
            ("clip_sample_range", 0, math.inf, "()"),
            ("dynamic_thresholding_ratio", 0, 1, "(]"),
            ("sample_max_value", 1, math.inf, "[)"),
        ):
            self._set(name, within(name, getattr(self, name), low, high, ends))
        self._set("num_train_timesteps", whole("num_train_timesteps", self.num_train_timesteps, 1))
        if self.num_train_timesteps > MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be at most {MOST_TIMESTEPS}, got {self.num_train_timesteps}")
        self._set("steps_offset", whole("steps_offset", self.steps_offset, 0))
        if self.sampler == "ddpm" and self.eta:
            raise ValueError(f"eta belongs to sampler='ddim', got eta={self.eta} with sampler='ddpm'")
        self._check_betas()
        self._check_timesteps()

    def _set(self, name: str, value: object) -> None:
        """Set a field of the frozen instance."""
        object.__setattr__(self, name, value)

    def _check_betas(self) -> None:
        """Store the betas as a tuple; raise ValueError unless the schedule can be sampled from."""
        if self.trained_betas is not None:
            self._set("trained_betas", tuple(betas_from_list(self.trained_betas, self.num_train_timesteps).tolist()))
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError("rescale_betas_zero_snr keeps the first and clears the last of at least two timesteps")
        alphas_cumprod = self.alphas_cumprod()
        if alphas_cumprod[0] == 1:
            raise ValueError(f"the first beta is so small that nothing is added to x_0, got {self.betas()[0]:g}")
        if alphas_cumprod[-1] == 0 and self.prediction_type == "epsilon":
            raise ValueError(
                "the schedule leaves no signal at the last timestep (zero terminal SNR), where an 'epsilon' prediction "
                "says nothing of x_0: use a network with prediction_type 'v_prediction' or 'sample'"
            )

    def _check_timesteps(self) -> None:
        """Store the timesteps as a tuple; raise ValueError unless they fit the schedule."""
        if self.num_inference_steps is not None:
            self._set("num_inference_steps", whole("num_inference_steps", self.num_inference_steps, 1))
        if self.timesteps is not None:
            self._set("timesteps", tuple(explicit(self.timesteps, self.num_train_timesteps).tolist()))
            if self.num_inference_steps not in (None, len(self.timesteps)):
                raise ValueError(
                    f"num_inference_steps={self.num_inference_steps} contradicts {len(self.timesteps)} given timesteps"
                )
        elif self.num_inference_steps is not None and self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} is more than the schedule has: "
                f"num_train_timesteps={self.num_train_timesteps}"
            )
        if self.num_inference_steps is not None:  # nobody asked for the run that no option describes
            self.inference_timesteps()

    @classmethod
    def from_options(cls, options: Mapping[str, object], base: "SamplerConfig | None" = None) -> "SamplerConfig":
        """Build a configuration from keyword arguments, on top of `base`.

        A number of steps or a spacing among the options replaces explicit timesteps of the base. Explicit timesteps
        among the options replace the base's number of steps.

        Raises:
            TypeError: An option has an unknown name; the message lists the allowed names.
        """
        if base is not None and not isinstance(base, cls):
            raise TypeError(f"config must be a SamplerConfig, got {type(base).__name__}")
        check_names("option", options, (field.name for field in dataclasses.fields(cls)))
        replaced: dict[str, Any] = {}
        if options.get("timesteps") is not None:
            replaced["num_inference_steps"] = None
        elif options.keys() & {"num_inference_steps", "timestep_spacing", "steps_offset"}:
            replaced["timesteps"] = None
        return dataclasses.replace(base or cls(), **{**replaced, **options})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; `SamplerConfig(**fields)` is its inverse."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def betas(self) -> Array:
        """Return beta_t: float64 [num_train_timesteps]."""
        if self.trained_betas is not None:
            betas = betas_from_list(self.trained_betas, self.num_train_timesteps)
        else:
            schedule = BETA_SCHEDULES[self.beta_schedule]
            betas = schedule(self.num_train_timesteps, self.beta_start, self.beta_end)
        return rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    def alphas_cumprod(self) -> Array:
        """Return alpha_bar_t: float64 [num_train_timesteps]."""
        return np.cumprod(1 - self.betas(), dtype=np.float64)

    def inference_timesteps(self) -> Timesteps:
        """Return the timesteps of the run, descending: int64 [num_inference_steps]."""
        if self.timesteps is not None:
            return explicit(self.timesteps, self.num_train_timesteps)
        steps = self.num_train_timesteps if self.num_inference_steps is None else self.num_inference_steps
        spacing = TIMESTEP_SPACINGS[self.timestep_spacing](self.num_train_timesteps, steps)
        if self.timestep_spacing == "leading":
            spacing = spacing + self.steps_offset
        check_range(spacing, self.num_train_timesteps)
        return spacing


def listed(*sources: Callable[..., Any]) -> Callable[[F], F]:
    """Let help() list every option of a function, instead of `**options`: the keywords of `sources` with defaults."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
        for source in sources:
            if dataclasses.is_dataclass(source):
                fields = [(f.name, f.default, f.type) for f in dataclasses.fields(source)]
            else:
                found = inspect.signature(source).parameters.values()
                fields = [(p.name, p.default, p.annotation) for p in found if p.kind is p.KEYWORD_ONLY]
            for name, default, annotation in fields:
                kind = inspect.Parameter.KEYWORD_ONLY
                keyword = inspect.Parameter(name, kind, default=default, annotation=annotation)
                parameters.setdefault(name, keyword)
        function.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        return function

    return decorate
