"""The arms of the step benchmark: our step and others', their states, and the check of their results."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.kernels.step import implementation, step_torch
from ddpm_fast.table import build_table

ROW, QUIET_ROW = 499, 999  # timestep 500, and the last timestep, where sigma is 0
PICKS = 16  # samples to compare with float64: the first, the last and some between
TOLERANCE = 1e-4  # float32 and the device's approximations of log, sine and cosine, times sigma = 0.1
BFLOAT16_TOLERANCE = 5e-3  # diffusers multiplies a bfloat16 output, and its noise, in bfloat16
NOT_INSTALLED = "not installed"


class WrongResultError(RuntimeError):
    """An error for an arm that does not compute the step."""


@dataclass(frozen=True)
class Case:
    """A case: what a step has to do.

    Attributes:
        name: A unique name.
        output_dtype: Dtype of the network's output.
        noise: "philox" (made in the step, from seeds), "tensor" (brought along) or "none".
        guided: Whether the output has a conditional and an unconditional half, for classifier-free guidance.
        input_dtype: Dtype of the denoiser's next input, if the step writes that input and the next timestep.
        options: Options of `SamplerConfig`.
    """

    name: str
    output_dtype: torch.dtype = torch.bfloat16
    noise: str = "philox"
    guided: bool = False
    input_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        return self.options.get("variance_type") == "learned_range"

    def bytes_per_element(self) -> int:
        """Return the bytes that the step must move through memory, for each element of the state.

        4 + 4: the float32 state, read and written. The output once: its one value an element, two if guided, and
        one more if the variance is learned (only the conditional half's is read). 4 for noise that comes in a
        tensor. The next input once, twice if guided. Left out is what each sample has once: seed, row, timestep.
        """
        outputs = (2 if self.guided else 1) + (1 if self.learned else 0)
        inputs = 0 if self.input_dtype is None else self.input_dtype.itemsize * (2 if self.guided else 1)
        return 8 + outputs * self.output_dtype.itemsize + (4 if self.noise == "tensor" else 0) + inputs


MAIN = Case("bfloat16 output")
FLOAT32 = Case("float32 output", torch.float32)
NEXT = Case("next input", input_dtype=torch.bfloat16)
CASES = (
    MAIN,
    FLOAT32,
    NEXT,
    Case("noise tensor", noise="tensor"),
    Case("guided", guided=True),
    Case("learned_range", options={"variance_type": "learned_range"}),
    Case("DDIM", noise="none", options={"sampler": "ddim"}),
)


@dataclass
class Problem:
    """A problem: the arguments of one step on one device, with every sample in row ROW."""

    case: Case
    x: Tensor
    output: Tensor
    coefficients: Tensor
    ids: Tensor
    base: Tensor
    options: dict[str, Any]  # keyword arguments of `step`
    columns: dict[str, Any]  # the table's, float64

    @property
    def traffic(self) -> int:
        return self.case.bytes_per_element() * self.x.numel()

    def twin(self) -> "Problem":
        """Return the same step on buffers of its own."""
        buffers = ("z", "model_input", "timestep")
        options = {key: v.clone() if key in buffers and v is not None else v for key, v in self.options.items()}
        return replace(self, x=self.x.clone(), output=self.output.clone(), options=options)


def make_problem(case: Case, shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Problem:
    """Make a random state, a random output, and the table of the case."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    batch, channels = shape[:2]
    halves = 2 if case.guided else 1
    table = build_table(SamplerConfig(**case.options))
    output = normal(halves * batch, channels * (2 if case.learned else 1), *shape[2:], dtype=case.output_dtype)
    seeds = torch.randint(2**62, (batch,), generator=generator, device=device)
    model_input = timestep = None
    if case.input_dtype is not None:
        model_input = torch.empty(halves * batch, *shape[1:], device=device, dtype=case.input_dtype)
        timestep = torch.zeros(halves * batch, device=device, dtype=torch.int64)
    return Problem(
        case=case,
        x=normal(*shape),
        output=output,
        coefficients=table.coefficients(device),
        ids=table.ids(device),
        base=torch.full((batch,), ROW, dtype=torch.int32, device=device),
        options={
            "seeds": seeds if case.noise == "philox" else None,
            "z": normal(*shape) if case.noise == "tensor" else None,
            "clip": 1.0,
            "guidance": torch.full((batch,), 3.0, device=device) if case.guided else None,
            "learned": table.learned,
            "use_output": bool((table.c_out != 0).any()),
            "model_input": model_input,
            "timestep": timestep,
        },
        columns={name: getattr(table, name) for name in ("a", "b", "c_x0", "c_x", "c_out", "sigma")},
    )


def memory_needed(case: Case, shape: tuple[int, ...], arm: str) -> int:
    """Return the bytes that an arm may hold at once: its operands and a result for the check, or its temporaries."""
    own = case.bytes_per_element() + 8 if arm == "ddpm_fast" else 40 + case.output_dtype.itemsize
    return own * math.prod(shape)


Evidence = Iterator[tuple[int, Tensor, Tensor | str]]


# Arms. The benchmark times `run`. `evidence` yields (row, result, noise): noise is "own" (the problem's), the tensor
# that was added, or "unknown" (the arm claims standard normals).


class Ours:
    """An arm: the fused step, in place and unchecked, as the sampling loop calls it."""

    tolerance = TOLERANCE

    def __init__(self, problem: Problem, backend: str) -> None:
        self.problem = problem
        self.step = implementation(backend)

    def run(self) -> Tensor:
        return self.into(self.problem.x)

    def into(self, x_new: Tensor) -> Tensor:
        p = self.problem
        return self.step(p.x, p.output, p.coefficients, p.ids, p.base, 0, **p.options, x_new=x_new)

    def evidence(self) -> Evidence:
        """Yield a step into NaN with everything that it wrote, then a step in place, which must give the same."""
        p = self.problem
        result = self.into(torch.full_like(p.x, math.nan))
        model_input, timestep = p.options["model_input"], p.options["timestep"]
        if model_input is not None:
            for half in model_input.split(len(p.x)):
                if not torch.equal(half, result.to(half.dtype)):
                    raise WrongResultError("wrong result, the next input is not the state")
            if not bool((timestep == p.ids[ROW + 1, 0]).all()):
                raise WrongResultError("wrong result, the next timestep is another")
        yield ROW, result, "own"
        if not torch.equal(self.twin_in_place(), result):
            raise WrongResultError("wrong result, in place is not as out of place")

    def twin_in_place(self) -> Tensor:
        p = self.problem
        self.problem = replace(p, x=p.x.clone())
        try:
            return self.run()
        finally:
            self.problem = p


def formula(x: Tensor, output: Tensor, a: Tensor, b: Tensor, c_x0: Tensor, c_x: Tensor, sigma: Tensor) -> Tensor:
    """Take the step in plain PyTorch: one line of Ho et al.'s algorithm 2, with their clipped x_0."""
    x0 = (a * x + b * output.float()).clamp(-1, 1)
    return c_x0 * x0 + c_x * x + sigma * torch.randn_like(x)


class Eager:
    """An arm: `formula`, operation by operation."""

    tolerance = TOLERANCE

    def __init__(self, problem: Problem, backend: str) -> None:
        self.problem = problem
        self.function: Callable[..., Tensor] = formula
        self.columns = self.row(ROW)

    def row(self, number: int) -> list[Tensor]:
        """Return the numbers of a row as tensors on the device, so that no copy is waited for."""
        columns = [self.problem.columns[name][number] for name in ("a", "b", "c_x0", "c_x", "sigma")]
        return [torch.tensor(value, dtype=torch.float32, device=self.problem.x.device) for value in columns]

    def run(self) -> Tensor:
        return self.function(self.problem.x, self.problem.output, *self.columns)

    def evidence(self) -> Evidence:
        """Yield a step, and its noise drawn again from the same state of torch's generator."""
        torch.manual_seed(7)
        result = self.run()
        torch.manual_seed(7)
        yield ROW, result, torch.randn_like(self.problem.x)


class Compiled(Eager):
    """An arm: `torch.compile(formula)`, compiled for this one shape."""

    mode: str | None = None

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__(problem, backend)
        torch._dynamo.reset()  # a compilation for each shape, without a limit on their number
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if problem.x.device.type == "cpu":
            options["backend"] = "eager"  # traced, not compiled, because the smoke run has to be quick
        else:
            options["mode"] = self.mode
        self.function = torch.compile(formula, **options)

    def evidence(self) -> Evidence:
        """Yield a step without noise, and a step whose own noise must be standard normal."""
        p = self.problem
        yield QUIET_ROW, self.function(p.x, p.output, *self.row(QUIET_ROW)).clone(), "none"
        yield ROW, self.run().clone(), "unknown"


class ReduceOverhead(Compiled):
    """An arm: the compiled formula, replayed as a CUDA graph."""

    mode = "reduce-overhead"


class Diffusers:
    """An arm: `DDPMScheduler.step`, as DDPMPipeline calls it."""

    def __init__(self, problem: Problem, backend: str) -> None:
        from diffusers import DDPMScheduler

        self.problem = problem
        half = problem.case.output_dtype != torch.float32
        self.tolerance = BFLOAT16_TOLERANCE if half else TOLERANCE
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_small", clip_sample=True)
        self.scheduler.set_timesteps(1000)
        self.timestep = self.scheduler.timesteps[ROW]

    def run(self) -> Tensor:
        x_new: Tensor = self.scheduler.step(self.problem.output, self.timestep, self.problem.x).prev_sample
        return x_new

    def evidence(self) -> Evidence:
        """Yield a step, and its noise drawn again in the output's dtype, as diffusers draws."""
        torch.manual_seed(7)
        result = self.run()
        torch.manual_seed(7)
        yield ROW, result, torch.randn_like(self.problem.output)


ARMS: dict[str, Callable[[Problem, str], Any]] = {
    "ddpm_fast": Ours,
    "diffusers": Diffusers,
    "torch eager": Eager,
    "torch.compile": Compiled,
    "torch.compile reduce-overhead": ReduceOverhead,
}


def missing(arm: str) -> str | None:
    """Return the reason why an arm cannot run here, or None."""
    return NOT_INSTALLED if arm == "diffusers" and importlib.util.find_spec("diffusers") is None else None


def check(arm: Any) -> float:
    """Compare an arm with float64 and return the largest difference.

    Some samples are compared element by element, all of them are summed up: an element that was not written is NaN.

    Raises:
        WrongResultError: it is above the arm's tolerance, or noise of its own making is not standard normal.
    """
    largest = 0.0
    for row, result, noise in arm.evidence():
        p = arm.problem
        picks = torch.linspace(0, len(p.x) - 1, min(PICKS, len(p.x)), device=p.x.device).round().long().unique()
        mean = judged(p, picks, row, noise)
        difference = result[picks].double() - mean
        if not math.isfinite(result.sum(dtype=torch.float64).item()):
            raise WrongResultError("wrong result, max difference nan")
        if noise == "unknown":
            check_normal(difference / p.columns["sigma"][row])
            continue
        largest = max(largest, difference.abs().max().item())
        if largest > arm.tolerance:
            raise WrongResultError(f"wrong result, max difference {largest:.3g} (tolerance {arm.tolerance:g})")
    return largest


def judged(p: Problem, picks: Tensor, row: int, noise: Any) -> Tensor:
    """Compute the step of some samples in float64, with `noise` as in an arm's evidence."""
    every = torch.cat([picks, picks + len(p.x)]) if p.case.guided else picks
    x = p.x[picks].double()
    options = {key: p.options[key] for key in ("clip", "learned", "use_output")}
    for key in ("seeds", "guidance", "z"):
        value = p.options[key]
        options[key] = None if value is None else value[picks]
    if not isinstance(noise, str):
        options |= {"seeds": None, "z": noise[picks].double()}
    elif noise != "own":
        options |= {"seeds": None, "z": None}
    for key in ("guidance", "z"):
        if options[key] is not None:
            options[key] = options[key].double()
    base = torch.full_like(p.base[picks], row)
    return step_torch(
        x, p.output[every], p.coefficients.double(), p.ids, base, 0, **options, x_new=torch.empty_like(x)
    )  # fmt: skip


def check_normal(z: Tensor) -> None:
    """Raise WrongResultError where the mean or the variance of `z` is six standard errors off."""
    n, mean, variance = z.numel(), z.mean().item(), z.square().mean().item()
    if not (abs(mean) <= 6 / math.sqrt(n) and abs(variance - 1) <= 6 * math.sqrt(2 / n)):
        raise WrongResultError(f"wrong result, noise of mean {mean:.3g} and variance {variance:.3g}")
