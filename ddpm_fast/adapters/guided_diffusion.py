"""OpenAI's guided-diffusion and improved-diffusion: their diffusion objects on our sampling loop.

Neither library is on PyPI, and other projects hold copies of both, so that an object is recognised by its attributes.
The library draws noise from torch's global generator at every step, the last step included. So does an accelerated
object under a global seed; all tensors count as contiguous. The table holds the numbers of the library's float64
arrays.
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

from ddpm_fast.adapters.runner import Accelerated, Options, Runner, adopt
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.device import resolve_device
from ddpm_fast.engine.noise import GeneratorNoise
from ddpm_fast.schedules import Array
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
    """Return whether `obj` is a GaussianDiffusion of one of the two libraries, or of a copy of them."""
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
    """Return the fast diffusion for `obj`; see `ddpm_fast.accelerate`."""
    one_of("model_mean_type", obj.model_mean_type.name, MEANS)
    one_of("model_var_type", obj.model_var_type.name, VARIANCES)
    kind: Any = type(obj)
    if not issubclass(kind, _FastDiffusion):
        _refuse_overrides(obj)
        kind = _fast(kind)
    return adopt(obj, kind, _runner=Runner(options))


@functools.cache
def _fast(kind: Any) -> Any:
    loops = {name: _loop_method(kind, name) for name in _LOOPS if hasattr(kind, name)}
    return type(f"Fast{kind.__name__}", (_FastDiffusion, kind), {"__module__": __name__, **loops})


def _blank(kind: Any) -> Any:
    """Return an instance without state, for pickle: a class made on the fly cannot be found by name."""
    cls = _fast(kind)
    return cls.__new__(cls)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Return the timesteps that a spaced run keeps.

    Args:
        num_timesteps: The number of timesteps of the training, T.
        section_counts: How many timesteps to keep in each of as many equal sections: [10, 15, 20] or "10,15,20".
            "ddimN" keeps N timesteps at the smallest integer stride that gives N.

    Raises:
        ValueError: A section has fewer timesteps than its count, or no stride gives N.
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
        # A sum, not a product, as in the library: rounding decides which of two neighbours is taken.
        places = accumulate(repeat(stride_in, max(count - 1, 0)), initial=0.0)
        kept |= {first + round(place) for place in places if count}
        first += length
    return kept


def table_of(diffusion: Any, eta: float | None = None) -> StepTable:
    """Return the rows of a run through all of the diffusion's timesteps.

    Args:
        diffusion: The object whose arrays are read.
        eta: DDIM's eta; None for DDPM.

    Raises:
        ValueError: eta makes more noise than there is at some step.
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
        # Song et al. 2021, eq. 12, in float32 as in the library: where alpha_bar is near 1 the rounding shows.
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
class _LoopArguments:
    """The arguments of one of the library's loops, under its names; eta is None for a DDPM loop."""

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

    def checked(self) -> "_LoopArguments":
        """Return the arguments with device, shape and model_kwargs resolved.

        Raises:
            TypeError, ValueError: An argument does not fit.
        """
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


class _Timescaled:
    """A network that is given the library's timesteps; a plain callable, so that its dtype counts for nothing."""

    def __init__(self, model: Any, scale: float | None) -> None:
        self.model = model
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, /, **kwargs: Any) -> Any:
        return self.model(x, t if self.scale is None else t.float() * self.scale, **kwargs)

    def module(self) -> Any:
        """Return the same as a torch.nn.Module, if the network is a module."""
        if self.scale is None or not isinstance(self.model, nn.Module):
            return self.model
        return _TimescaledModule(self.model, self.scale)


class _TimescaledModule(nn.Module):
    """A module that is given its timesteps times `scale`."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.training = model.training

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return self.model(x, t.float() * self.scale, **kwargs)


class _Denoised:
    """A network that predicts x0 and passes the prediction through denoised_fn."""

    def __init__(
        self, network: _Timescaled, denoised_fn: Callable[[Tensor], Tensor], table: StepTable, given: _LoopArguments
    ) -> None:
        self.network = network
        self.denoised_fn = denoised_fn
        self.shape = (given.shape[0], given.shape[1] * (2 if table.doubled else 1), *given.shape[2:])
        columns = np.zeros((2, int(table.timestep.max()) + 1), np.float32)
        columns[:, table.timestep] = table.a, table.b
        self.columns = torch.from_numpy(columns).to(given.device)

    def __call__(self, x: Tensor, t: Tensor, /, **kwargs: Any) -> Any:
        output = self.network(x, t, **kwargs)
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or tuple(output.shape) != self.shape:
            return output  # the loop raises the error
        out, rest = output[:, : x.shape[1]], output[:, x.shape[1] :]
        a, b = (column[t].view(-1, *(1,) * (x.dim() - 1)) for column in self.columns)
        x0 = self.denoised_fn(a * x + b * out)
        if not isinstance(x0, Tensor) or x0.shape != x.shape:
            raise ValueError(f"denoised_fn must return a tensor of the shape that it gets, {tuple(x.shape)}")
        return torch.cat([x0, rest], dim=1)


class _Guidance:
    """A correction of the steps by cond_fn, the gradient of log p(y | x).

    The step is linear in the gradient, so that the correction is added after the step. DDPM adds the variance times the
    gradient (Dhariwal & Nichol 2021, algorithm 1), at t = 0 as well. DDIM shifts epsilon by the gradient, and with
    epsilon the x0 prediction (algorithm 2).

    Attributes:
        shift: Shift of the last step's x0 prediction.
    """

    def __init__(self, diffusion: Any, cond_fn: _Timescaled, given: _LoopArguments, table: StepTable) -> None:
        self.cond_fn = cond_fn
        self.given = given
        self.table = table
        self.shift: Tensor | float = 0.0
        if given.eta is not None:
            alpha_bar = _column(diffusion, "alphas_cumprod").astype(np.float32)
            self.to_x0 = _column(diffusion, "sqrt_recipm1_alphas_cumprod") * np.sqrt(1 - alpha_bar)
        elif not table.learned:
            self.variance, _ = _fixed_variance(diffusion)

    def __call__(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        t = torch.full((len(x),), int(self.table.timestep[step]), device=x.device, dtype=torch.int64)
        gradient: Tensor = self.cond_fn(x.clone(), t, **self.given.model_kwargs).float()
        if self.given.eta is not None:
            self.shift = shift = float(self.to_x0[step]) * gradient
            return float(self.table.c_x0[step]) * shift
        if not self.table.learned:
            return float(self.variance[step]) * gradient
        share = (output[:, x.shape[1] :].float() + 1) / 2
        low, high = float(self.table.log_min[step]), float(self.table.log_max[step])
        return torch.exp(share * high + (1 - share) * low) * gradient


class _FastDiffusion(Accelerated):
    """A base in front of the object's class; `_loop_method` makes its sampling loops."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__dict__

    def _run(self, given: _LoopArguments, every: bool) -> Iterator[dict[str, Tensor]]:
        """Run the sampler. Yields the last state, or with `every` the state and the x0 prediction after every step."""
        if self._runner.options.speculate is not False and (given.denoised_fn or given.cond_fn):
            raise ValueError("speculate does not go with denoised_fn or cond_fn, which follow every step")
        table = table_of(self, given.eta)
        clipping = Clipping(limit=1.0 if given.clip_denoised else None)
        plain = _Timescaled(given.model, _time_scale(self))
        network: Any = plain
        owner: Any = (given.model, plain.scale)
        late = given.denoised_fn if not np.any(table.c_x0) else None  # the x0 prediction is only shown
        if late is not None:
            clipping = Clipping()
        elif given.denoised_fn is not None:
            network, owner = _Denoised(plain, given.denoised_fn, table, given), None
            table = replace(table, a=np.zeros(len(table)), b=np.ones(len(table)))
        guidance = None
        if given.cond_fn is not None:
            guidance = _Guidance(self, _Timescaled(given.cond_fn, plain.scale), given, table)
        call = Call.of(
            network, given.shape, model_kwargs=given.model_kwargs, device=given.device, dtype=torch.float32,
            module=plain.module(),
        )  # fmt: skip
        with self._runner.alone(iterator=every) as runner:
            loop = runner.loop(
                call, table, clipping, owner=owner, correction=guidance,
                execution=None if network is plain else "eager", hoistable=network is plain, watched=every,
            )  # fmt: skip
            noise = runner.noise(None, loop)
            # The library draws noise even where no step reads it; a replay of several steps would leave these draws
            # out.
            several = self._runner.options.execution.steps_per_replay > 1
            singly = every or (isinstance(noise, GeneratorNoise) and several)
            for done in loop.steps(
                noise, given.noise, previews=every, every_step=singly, progress=bool(given.progress)
            ):
                if not every:
                    if done == len(table):
                        yield {"sample": loop.x.clone()}
                    continue
                assert loop.x0 is not None  # previews were asked for
                x0 = loop.x0.clone()
                if late is not None:
                    with torch.no_grad():
                        x0 = late(x0).clamp(-1, 1) if given.clip_denoised else late(x0)
                shown = loop.x.clone()
                version = shown._version
                state = {"sample": shown, "pred_xstart": x0 + guidance.shift if guidance else x0}
                yield state
                if state["sample"] is not shown or shown._version != version:  # the library continues from the change
                    loop.set_state(state["sample"])


def _loop_method(kind: type, name: str) -> Callable[..., Any]:
    """Return a loop method with the signature of the library's; improved-diffusion's also takes cond_fn, by keyword."""
    stock = getattr(kind, name)
    signature = inspect.signature(stock)
    parameters = list(signature.parameters.values())
    strange = {parameter.name for parameter in parameters[1:]} - {each.name for each in fields(_LoopArguments)}
    if strange:
        raise TypeError(f"{kind.__name__}.{name} takes {min(strange)}, which is not known: not accelerated")
    if "cond_fn" not in signature.parameters:
        by_keyword = inspect.Parameter("cond_fn", inspect.Parameter.KEYWORD_ONLY, default=None)
        signature = signature.replace(parameters=[*parameters, by_keyword])

    @functools.wraps(stock)
    def loop(self: _FastDiffusion, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        arguments = _LoopArguments(**dict(given))
        if name.startswith("ddim"):
            arguments = replace(arguments, eta=within("eta", arguments.eta, 0, np.inf, "[)"))
        states = self._run(arguments.checked(), every=name.endswith("progressive"))
        if name.endswith("progressive"):
            return states
        (final,) = states
        return final["sample"]

    return loop


def _refuse_overrides(obj: Any) -> None:
    """Raise TypeError for a subclass, other than SpacedDiffusion, that overrides how samples are drawn."""
    spaced = _is_spaced(obj)
    for name in _SAMPLING:
        *own, _ = [vars(obj), *(vars(cls) for cls in type(obj).__mro__ if name in vars(cls))]
        if any(name in names and not (spaced and name in _SPACED and "_wrap_model" in names) for names in own):
            raise TypeError(f"{type(obj).__name__} has a {name} of its own, which would be lost: not accelerated")


def _is_spaced(diffusion: Any) -> bool:
    return hasattr(diffusion, "timestep_map") and hasattr(diffusion, "original_num_steps")


def _time_scale(diffusion: Any) -> float | None:
    """Return the factor of the network's timesteps; None leaves the timesteps integers."""
    if not diffusion.rescale_timesteps:
        return None
    return 1000.0 / float(diffusion.original_num_steps if _is_spaced(diffusion) else diffusion.num_timesteps)


def _column(diffusion: Any, name: str) -> Array:
    """Return an array of the diffusion, in the order of the run."""
    return np.array(getattr(diffusion, name)[::-1], np.float64)


def _fixed_variance(diffusion: Any) -> tuple[Array, Array]:
    """Return variance and log-variance of the variance types that are not learned."""
    small, log_small = _column(diffusion, "posterior_variance"), _column(diffusion, "posterior_log_variance_clipped")
    if diffusion.model_var_type.name == "FIXED_SMALL":
        return small, log_small  # they differ at t = 0
    large = np.append(_column(diffusion, "betas")[:-1], small[-2])
    return large, np.log(large)
