"""OpenAI's guided-diffusion and improved-diffusion: their diffusion objects, walked by the engine.

Neither is a package to depend on, and both live on as copies in other projects: an object is known by its attributes.
The library draws noise from torch's global generator at every step, the last one included; so does an accelerated
object under a global seed, all tensors taken as contiguous. Its float64 arrays are the table's numbers.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast.adapters.walk import Options, Walker, adopt
from ddpm_fast.engine.device import resolve_device
from ddpm_fast.engine.loop import Loop
from ddpm_fast.engine.noise import GeneratorNoise
from ddpm_fast.schedules import Array
from ddpm_fast.speculation.loop import Speculation
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import one_of, whole, within

MEANS = ("PREVIOUS_X", "START_X", "EPSILON")
VARIANCES = ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")

_ARRAYS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_mean_coef1", "posterior_mean_coef2",
    "posterior_variance", "posterior_log_variance_clipped", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip
_LOOPS = ("p_sample_loop", "p_sample_loop_progressive", "ddim_sample_loop", "ddim_sample_loop_progressive")
_SPACED = ("p_mean_variance", "condition_mean", "condition_score", "_scale_timesteps")  # what SpacedDiffusion overrides
_SAMPLING = (
    *_SPACED, *_LOOPS, "p_sample", "ddim_sample", "q_posterior_mean_variance",
    "_predict_xstart_from_eps", "_predict_xstart_from_xprev", "_predict_eps_from_xstart",
)  # fmt: skip


def recognises(obj: Any) -> bool:
    """Whether `obj` is a GaussianDiffusion of one of the two libraries, or of a copy of them."""
    if isinstance(obj, type) or not all(isinstance(getattr(obj, name, None), np.ndarray) for name in _ARRAYS):
        return False
    methods = ("p_mean_variance", "p_sample_loop", "ddim_sample_loop")
    types = ("model_mean_type", "model_var_type")
    return (
        obj.betas.ndim == 1
        and all(hasattr(obj, name) for name in ("num_timesteps", "rescale_timesteps"))
        and all(hasattr(getattr(obj, name, None), "name") for name in types)
        and all(callable(getattr(obj, name, None)) for name in methods)
    )


def accelerate(obj: Any, options: Options) -> Any:
    """The fast diffusion for `obj`; see `ddpm_fast.accelerate`."""
    one_of("model_mean_type", obj.model_mean_type.name, MEANS)
    one_of("model_var_type", obj.model_var_type.name, VARIANCES)
    kind: Any = type(obj)
    if not issubclass(kind, _Fast):
        _refuse_overrides(obj)
        kind = _fast(kind)
    return adopt(obj, kind, _walker=Walker(options))


@functools.cache
def _fast(kind: Any) -> Any:
    loops = {name: _loop_method(kind, name) for name in _LOOPS if hasattr(kind, name)}
    return type(f"Fast{kind.__name__}", (_Fast, kind), {"__module__": __name__, **loops})


def _blank(kind: Any) -> Any:
    """An instance without its state, as pickle wants it: classes made on the fly have no address."""
    cls = _fast(kind)
    return cls.__new__(cls)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps that a spaced walk keeps.

    Args:
        num_timesteps: T of training.
        section_counts: how many to keep in each of as many equal sections: [10, 15, 20] or "10,15,20". Or "ddimN": N
            of them by the smallest integer stride that gives as many.

    Raises:
        ValueError: more timesteps than a section has; no stride that gives N.
    """
    whole("num_timesteps", num_timesteps, 1)
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            wanted = int(section_counts.removeprefix("ddim"))
            for stride in range(1, num_timesteps):
                if -(-num_timesteps // stride) == wanted:
                    return set(range(0, num_timesteps, stride))
            raise ValueError(f"no integer stride takes exactly {wanted} of {num_timesteps} timesteps")
        section_counts = [int(count) for count in section_counts.split(",")]
    kept: set[int] = set()
    size, longer = divmod(num_timesteps, len(section_counts))
    first = 0
    for number, count in enumerate(section_counts):
        length = size + (number < longer)
        whole("every count in section_counts", count, 0, length)
        stride_in = (length - 1) / (count - 1) if count > 1 else 1.0
        # Summed up, not multiplied: rounding decides which of two neighbours is taken.
        places = accumulate(repeat(stride_in, max(count - 1, 0)), initial=0.0)
        kept |= {first + round(place) for place in places if count}
        first += length
    return kept


def table_of(diffusion: Any, eta: float | None = None) -> StepTable:
    """The rows of a walk through all of the diffusion's timesteps.

    Args:
        diffusion: whose arrays are read.
        eta: of DDIM; None for DDPM.

    Raises:
        ValueError: an eta that makes more noise than there is.
    """
    column = functools.partial(_column, diffusion)
    recip, recipm1 = column("sqrt_recip_alphas_cumprod"), column("sqrt_recipm1_alphas_cumprod")
    coef1, coef2 = column("posterior_mean_coef1"), column("posterior_mean_coef2")
    mean, variance = diffusion.model_mean_type.name, diffusion.model_var_type.name
    one = np.ones(len(recip))
    index = np.arange(len(recip) - 1, -1, -1)
    noisy = index > 0
    a, b = {
        "EPSILON": (recip, -recipm1),
        "START_X": (0 * one, one),
        "PREVIOUS_X": (-coef2 / coef1, 1 / coef1),
    }[mean]
    columns: dict[str, Array] = {"a": a, "b": b}
    doubled = variance.startswith("LEARNED")
    if eta is not None:
        # Song et al. 2021, eq. 12, in float32 as the library: where alpha_bar is near 1 its rounding is seen.
        alpha_bar, alpha_bar_s = (column(name).astype(np.float32) for name in ("alphas_cumprod", "alphas_cumprod_prev"))
        sigma = np.float32(eta) * np.sqrt((1 - alpha_bar_s) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / alpha_bar_s)
        if (1 - alpha_bar_s < sigma**2).any():
            raise ValueError(f"eta={eta:g} makes more noise than there is at some step: it must be at most 1")
        d = np.sqrt(1 - alpha_bar_s - sigma**2).astype(np.float64)
        columns["c_x0"] = np.sqrt(alpha_bar_s) - d / recipm1
        columns["c_x"] = d * recip / recipm1
        columns["sigma"] = (sigma * noisy).astype(np.float64)
    else:
        columns |= {"c_out": one} if mean == "PREVIOUS_X" else {"c_x0": coef1, "c_x": coef2}
        if doubled:
            columns["sigma"] = noisy.astype(np.float64)
            if variance == "LEARNED_RANGE":
                columns |= {"log_min": column("posterior_log_variance_clipped"), "log_max": np.log(column("betas"))}
        else:
            columns["sigma"] = np.exp(0.5 * _fixed_variance(diffusion)[1]) * noisy
    timestep = np.asarray(diffusion.timestep_map, np.int64)[index] if _is_spaced(diffusion) else index
    learned = doubled and eta is None
    return StepTable.of(timestep, columns, draws=one.astype(bool), learned=learned, doubled=doubled)


@dataclass(frozen=True)
class _Call:
    """The arguments of a loop, under the library's names; with eta=None it is a DDPM loop."""

    model: Any
    shape: Any
    noise: Any = None
    clip_denoised: bool = True
    denoised_fn: Any = None
    cond_fn: Any = None
    model_kwargs: Any = None
    device: Any = None
    progress: bool = False
    eta: float | None = None

    def checked(self) -> "_Call":
        """With device, shape and model_kwargs as the walk takes them; raise TypeError or ValueError for bad input."""
        if not isinstance(self.shape, (tuple, list)) or len(self.shape) < 2:
            raise TypeError(f"shape must be a tuple (batch, channels, ...), got {self.shape!r}")
        shape = tuple(whole("every size in shape", size, 1) for size in self.shape)
        for name in ("model", "denoised_fn", "cond_fn"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "model"):
                raise TypeError(f"{name} must be callable, got {type(value).__name__}")
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, Mapping):
            raise TypeError(f"model_kwargs must be a dict, got {type(self.model_kwargs).__name__}")
        device = self.device
        if device is None:
            parameters = getattr(self.model, "parameters", tuple)
            device = next((parameter.device for parameter in parameters()), None)
            if device is None:
                raise ValueError("the model has no parameters that tell where it is: pass device=")
        device = resolve_device(self.model, device)
        if self.noise is not None:
            if not isinstance(self.noise, Tensor):
                raise TypeError(f"noise must be a tensor, got {type(self.noise).__name__}")
            got = (tuple(self.noise.shape), self.noise.dtype, self.noise.device)
            if got != (shape, torch.float32, device):
                raise ValueError(f"noise must be {shape} float32 on {device}, got {got[0]} {got[1]} on {got[2]}")
        return replace(self, shape=shape, device=device, model_kwargs=dict(self.model_kwargs or {}))


class _Told:
    """The network, told what the library tells it; a plain callable, so that nothing decides on its dtype."""

    def __init__(self, model: Any, scale: float | None) -> None:
        self.model = model
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, /, **kwargs: Any) -> Any:
        return self.model(x, t if self.scale is None else t.float() * self.scale, **kwargs)

    def module(self) -> Any:
        """The same as a torch.nn.Module, if the network is one."""
        if self.scale is None or not isinstance(self.model, nn.Module):
            return self.model
        return _Scaled(self.model, self.scale)


class _Scaled(nn.Module):
    """A network that is told its timesteps times `scale`."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.training = model.training

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return self.model(x, t.float() * self.scale, **kwargs)


class _Denoised:
    """A network that predicts the origin, and lets denoised_fn have it first."""

    def __init__(self, told: _Told, denoised_fn: Callable[[Tensor], Tensor], table: StepTable, call: _Call) -> None:
        self.told = told
        self.denoised_fn = denoised_fn
        self.shape = (call.shape[0], call.shape[1] * (2 if table.doubled else 1), *call.shape[2:])
        origin = np.zeros((2, int(table.timestep.max()) + 1), np.float32)
        origin[:, table.timestep] = table.a, table.b
        self.origin = torch.from_numpy(origin).to(call.device)

    def __call__(self, x: Tensor, t: Tensor, /, **kwargs: Any) -> Any:
        output = self.told(x, t, **kwargs)
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or tuple(output.shape) != self.shape:
            return output  # the loop says what is wrong
        out, rest = output[:, : x.shape[1]], output[:, x.shape[1] :]
        a, b = (column[t].view(-1, *(1,) * (x.dim() - 1)) for column in self.origin)
        x0 = self.denoised_fn(a * x + b * out)
        if not isinstance(x0, Tensor) or x0.shape != x.shape:
            raise ValueError(f"denoised_fn must return a tensor of the shape that it gets, {tuple(x.shape)}")
        return torch.cat([x0, rest], dim=1)


class _Guidance:
    """What cond_fn, the gradient of log p(y | x), adds to a step: linear in it, so added after the step.

    DDPM: the variance times the gradient (Dhariwal & Nichol 2021, algorithm 1), t = 0 included. DDIM: the gradient
    shifts epsilon, and with it the origin estimate (algorithm 2).

    Attributes:
        shift: of the last step's origin estimate.
    """

    def __init__(self, diffusion: Any, told: _Told, call: _Call, table: StepTable) -> None:
        self.told = told
        self.call = call
        self.table = table
        self.shift: Tensor | float = 0.0
        if call.eta is not None:
            alpha_bar = _column(diffusion, "alphas_cumprod").astype(np.float32)
            self.to_origin = _column(diffusion, "sqrt_recipm1_alphas_cumprod") * np.sqrt(1 - alpha_bar)
        elif not table.learned:
            self.variance, _ = _fixed_variance(diffusion)

    def __call__(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        t = torch.full((len(x),), int(self.table.timestep[step]), device=x.device)
        gradient = self.told(x.clone(), t, **self.call.model_kwargs).float()
        if self.call.eta is not None:
            self.shift = shift = float(self.to_origin[step]) * gradient
            return float(self.table.c_x0[step]) * shift
        if not self.table.learned:
            return float(self.variance[step]) * gradient
        share = (output[:, x.shape[1] :].float() + 1) / 2
        low, high = float(self.table.log_min[step]), float(self.table.log_max[step])
        return torch.exp(share * high + (1 - share) * low) * gradient


class _Fast:
    """Stands in front of the object's class; its loops are made by `_loop_method`."""

    _walker: Walker

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__dict__

    @property
    def last_seeds(self) -> list[int] | None:
        """The seeds of the last walk's samples, one each; None where a global seed made the noise."""
        return self._walker.last_seeds

    @property
    def last_speculation(self) -> Speculation | None:
        """What the last walk did, if it speculated."""
        return self._walker.last_speculation

    def _walk(self, call: _Call, every: bool) -> Iterator[dict[str, Tensor]]:
        """Walk; the last state, or with `every` all states and origin estimates."""
        if self._walker.options.speculate is not False and (call.denoised_fn or call.cond_fn):
            raise ValueError("speculate does not go with denoised_fn or cond_fn, which follow every step")
        table = table_of(self, call.eta)
        clipping = Clipping(limit=1.0 if call.clip_denoised else None)
        told = _Told(call.model, _time_scale(self))
        network: Any = told
        owner: Any = (call.model, told.scale)
        late = call.denoised_fn if not np.any(table.c_x0) else None  # the origin estimate is shown only
        if late is not None:
            clipping = Clipping()
        elif call.denoised_fn is not None:
            network, owner = _Denoised(told, call.denoised_fn, table, call), None
            table = replace(table, a=np.zeros(len(table)), b=np.ones(len(table)))
        guidance = None
        if call.cond_fn is not None:
            guidance = _Guidance(self, _Told(call.cond_fn, told.scale), call, table)
        with self._walker.alone(generator=every) as walker:
            loop = walker.loop(
                network, call.shape, table, clipping, owner=owner, device=call.device, dtype=torch.float32,
                model_kwargs=call.model_kwargs, correction=guidance,
                execution="eager" if network is not told else None,
                module=told.module(), hoistable=network is told, watched=every,
            )  # fmt: skip
            noise = walker.noise(None, loop)
            # The library draws noise where none is used, too; several steps in one replay would leave it out.
            singly = every or (isinstance(noise, GeneratorNoise) and self._walker.options.how.steps_per_replay > 1)
            for done in loop.steps(noise, call.noise, previews=every, every_step=singly, progress=bool(call.progress)):
                if not every:
                    if done == len(table):
                        yield {"sample": loop.x.clone()}
                    continue
                assert isinstance(loop, Loop)  # the other has no states to show, and has said so
                assert loop.x0 is not None
                origin = loop.x0.clone()
                if late is not None:
                    with torch.no_grad():
                        origin = late(origin).clamp(-1, 1) if call.clip_denoised else late(origin)
                shown = loop.x.clone()
                version = shown._version
                state = {"sample": shown, "pred_xstart": origin + guidance.shift if guidance else origin}
                yield state
                if state["sample"] is not shown or shown._version != version:  # the library goes on from there
                    with torch.no_grad():
                        loop.x.copy_(state["sample"])
                        loop.network.input.copy_(loop.x)


def _loop_method(kind: type, name: str) -> Callable[..., Any]:
    """The method of that name, with its own signature (improved-diffusion's has no cond_fn: here by keyword)."""
    stock = getattr(kind, name)
    signature = inspect.signature(stock)
    parameters = list(signature.parameters.values())
    strange = {parameter.name for parameter in parameters[1:]} - {each.name for each in fields(_Call)}
    if strange:
        raise TypeError(f"{kind.__name__}.{name} takes {min(strange)}, which is not known: not accelerated")
    if "cond_fn" not in signature.parameters:
        by_keyword = inspect.Parameter("cond_fn", inspect.Parameter.KEYWORD_ONLY, default=None)
        signature = signature.replace(parameters=[*parameters, by_keyword])

    @functools.wraps(stock)
    def loop(self: _Fast, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        call = _Call(**dict(given))
        if name.startswith("ddim"):
            call = replace(call, eta=within("eta", call.eta, 0, np.inf, "[)"))
        states = self._walk(call.checked(), every=name.endswith("progressive"))
        if name.endswith("progressive"):
            return states
        (final,) = states
        return final["sample"]

    return loop


def _refuse_overrides(obj: Any) -> None:
    """Raise TypeError for a subclass that samples in a way of its own; SpacedDiffusion's way is known."""
    spaced = _is_spaced(obj)
    for name in _SAMPLING:
        *own, _ = [vars(obj), *(vars(cls) for cls in type(obj).__mro__ if name in vars(cls))]
        if any(name in names and not (spaced and name in _SPACED and "_wrap_model" in names) for names in own):
            raise TypeError(f"{type(obj).__name__} has a {name} of its own, which would be lost: not accelerated")


def _is_spaced(diffusion: Any) -> bool:
    return hasattr(diffusion, "timestep_map") and hasattr(diffusion, "original_num_steps")


def _time_scale(diffusion: Any) -> float | None:
    """What the network's timesteps are multiplied by; None leaves them integers."""
    if not diffusion.rescale_timesteps:
        return None
    return 1000.0 / (diffusion.original_num_steps if _is_spaced(diffusion) else diffusion.num_timesteps)


def _column(diffusion: Any, name: str) -> Array:
    """An array of the diffusion, the walk's first step first."""
    return np.array(getattr(diffusion, name)[::-1], np.float64)


def _fixed_variance(diffusion: Any) -> tuple[Array, Array]:
    """Variance and log-variance of the types that do not learn it."""
    small, log_small = _column(diffusion, "posterior_variance"), _column(diffusion, "posterior_log_variance_clipped")
    if diffusion.model_var_type.name == "FIXED_SMALL":
        return small, log_small  # they differ at t = 0
    large = np.append(_column(diffusion, "betas")[:-1], small[-2])
    return large, np.log(large)
