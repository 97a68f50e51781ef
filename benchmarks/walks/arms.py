"""The arms: the ways to sample that are compared, and the gate that each arm has to pass.

An arm is built once, compilation and capture included, and then samples many times. The gate takes single steps with
the same code at rows all over the table. It compares each step with the network in float32 followed by the posterior
in float64, with the noise that the arm drew.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.common.standins import stand_in_for_torchvision
from benchmarks.walks.networks import Kind, Problem, tensor_of
from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.execution import ExecutionOptions
from ddpm_fast.engine.graph import StepGraph
from ddpm_fast.engine.loop import Loop
from ddpm_fast.engine.tf32 import tf32
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.sample import Sampler
from ddpm_fast.seeding import resolve_seeds, seed_tensor
from ddpm_fast.table import StepTable, build_table

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Largest error of the network's output, as a share of the largest output.
NETWORK_ERROR = {"float32": 2e-4, "tf32": 1e-2, "bfloat16": 5e-2}
STATE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
Step = tuple[int, Tensor, Tensor, Tensor]  # row, x, x', z


class WrongStepError(Exception):
    """An arm does not take the right steps."""


class Arm:
    """A way to sample.

    Attributes:
        problem: The network and its settings.
        table: The rows of a run.
        state_dtype: The dtype of x between two steps.
    """

    state_dtype = torch.float32

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.table = build_table(problem.config)

    def sample(self, seed: int, steps: int | None = None) -> Tensor | None:
        """Return x_0 on the device, [B, C, H, W]. May return before the device has finished.

        Args:
            seed: The seed of the noise.
            steps: The number of first steps to take. None takes all steps.
        """
        raise NotImplementedError

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Take one step from x at a row of the table. Return x' and the noise in it."""
        raise NotImplementedError

    def steps(self, rows: list[int]) -> Iterator[Step]:
        """Yield a step at each row."""
        for row in rows:
            generator = torch.Generator().manual_seed(row)
            x = torch.randn(self.problem.shape, generator=generator).bfloat16().float().to(self.problem.device)
            x_new, z = self.step(x, row)
            yield row, x, x_new, z


def check(arm: Arm) -> float:
    """Return the largest error of an arm's steps, as a share of the error that rounding explains.

    Raises:
        WrongStepError: The share is above 1.
    """
    problem, table = arm.problem, arm.table
    last = problem.steps - 1
    rows = sorted({0, problem.steps // 4, problem.steps // 2, 3 * problem.steps // 4, last})
    worst = 0.0
    for row, x, x_new, z in arm.steps(rows):
        t = torch.full((problem.batch,), int(table.timestep[row]), device=problem.device)
        with torch.no_grad(), tf32(False if problem.device.type == "cuda" else None):
            output = tensor_of(problem.exact(x.to(problem.dtype).float(), t, **problem.kwargs)).double()
        expected = posterior(table, row, x.double(), output, z.double(), problem.config.clip_sample)
        reach = float(table.c_x0[row] * abs(table.b[row])) * output.abs().max().item()
        allowed = NETWORK_ERROR[problem.precision] * reach
        allowed += STATE_ERROR[arm.state_dtype] * expected.abs().max().item()
        error = (x_new.double() - expected).abs().max().item()
        if not error <= allowed:
            raise WrongStepError(f"the step at row {row} is off by {error:.1e}; rounding explains {allowed:.1e}")
        worst = max(worst, error / allowed)
    return worst


def posterior(table: StepTable, row: int, x: Tensor, output: Tensor, z: Tensor, clip: bool) -> Tensor:
    """Return x_{t-1} in float64 (Ho et al. 2020, eq. 7 and 15)."""
    x0 = float(table.a[row]) * x + float(table.b[row]) * output
    x0 = x0.clamp(-1, 1) if clip else x0
    return float(table.c_x0[row]) * x0 + float(table.c_x[row]) * x + float(table.sigma[row]) * z


@contextlib.contextmanager
def options_carried_out() -> Iterator[None]:
    """Raise RuntimeError where ddpm_fast warns that an option was not carried out: the arm would bear a wrong name."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ddpm_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if warned:
        raise RuntimeError("; ".join(warned))


class Ours(Arm):
    """The sampler of ddpm_fast.

    Args:
        problem: The network and its settings.
        options: Execution options of the sampler.
    """

    def __init__(self, problem: Problem, **options: Unpack[ExecutionOptions]) -> None:
        super().__init__(problem)
        with options_carried_out():
            self.sampler = Sampler(
                problem.model,
                problem.shape,
                model_kwargs=problem.kwargs,
                config=problem.config,
                device=problem.device,
                **options,
            )
            assert isinstance(self.sampler.loop, Loop)
            self.loop = self.sampler.loop
            self.sample(0)

    def sample(self, seed: int, steps: int | None = None) -> Tensor:
        return self.sampler(seeds=seed, progress=False)

    def steps(self, rows: list[int]) -> Iterator[Step]:
        seeds = seed_tensor(resolve_seeds(1, self.problem.batch)).to(self.problem.device)
        start = torch.randn(self.problem.shape, generator=torch.Generator().manual_seed(0)).to(self.problem.device)
        kept = sorted({kept for row in rows for kept in (row - 1, row) if kept >= 0})
        frames = self.sampler(seeds=1, x_T=start, output="trajectory", output_steps=kept, progress=False).frames
        assert frames is not None
        after = dict(zip(kept, frames, strict=True)) | {-1: start}
        for row in rows:
            ids = torch.full_like(seeds, int(self.table.noise_id[row]))
            z = normal(seeds, ids, Stream.STEP, self.problem.shape[1:])
            yield row, after[row - 1], after[row], z


class NetworkAlone(Arm):
    """The network call of ddpm_fast without the step, repeated as often as a run needs it. It samples nothing."""

    def __init__(self, problem: Problem, **options: Unpack[ExecutionOptions]) -> None:
        super().__init__(problem)
        network = Ours(problem, **options).loop.network
        self.call: Callable[[], Any] = (
            partial(network, 0) if problem.device.type == "cpu" else StepGraph(network, problem.device).replay
        )

    def sample(self, seed: int, steps: int | None = None) -> None:
        with torch.no_grad():
            for _ in range(self.problem.steps):
                self.call()


class Diffusers(Arm):
    """The pipeline of diffusers as it is shipped; for a transformer the same loop without the pipeline's decoder."""

    def __init__(self, problem: Problem) -> None:
        from diffusers import DDPMPipeline, DDPMScheduler

        super().__init__(problem)
        self.state_dtype = problem.dtype
        self.scheduler = DDPMScheduler(clip_sample=problem.config.clip_sample)
        self.pipeline = None
        if hasattr(problem.model, "config"):
            self.pipeline = DDPMPipeline(problem.model, self.scheduler)
            self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler.set_timesteps(problem.steps)
        self.sample(0)

    def sample(self, seed: int, steps: int | None = None) -> Tensor:
        problem = self.problem
        generator = torch.Generator(problem.device).manual_seed(seed)
        if self.pipeline is not None:
            images: Tensor = self.pipeline(problem.batch, generator, steps or problem.steps, output_type="pt").images
            self.scheduler.set_timesteps(problem.steps)
            return 2 * images - 1
        x = torch.randn(problem.shape, generator=generator, device=problem.device, dtype=problem.dtype)
        with torch.no_grad():
            for t in self.scheduler.timesteps[:steps]:
                x = self.scheduler.step(self._network(x, t), t, x, generator=generator).prev_sample
        return x

    def _network(self, x: Tensor, t: Tensor) -> Tensor:
        if self.pipeline is not None:
            return tensor_of(self.problem.model(x, t))
        return tensor_of(self.problem.model(x, t.to(x.device).expand(len(x)), **self.problem.kwargs))

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        x = x.to(self.state_dtype)
        t = self.scheduler.timesteps[row]
        generator = torch.Generator(x.device).manual_seed(row)
        with torch.no_grad():
            x_new = self.scheduler.step(self._network(x, t), t, x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=generator.manual_seed(row), device=x.device, dtype=x.dtype)
        return x_new, z


class Lucidrains(Arm):
    """The loop of denoising-diffusion-pytorch around the same network. A shorter run takes the loop's first steps."""

    def __init__(self, problem: Problem) -> None:
        stand_in_for_torchvision()
        from denoising_diffusion_pytorch import GaussianDiffusion

        class Wrapped(nn.Module):
            channels = out_dim = problem.shape[1]
            self_condition = False

            def __init__(self) -> None:
                super().__init__()
                self.model = problem.model

            def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
                return tensor_of(self.model(x.to(problem.dtype), t)).float()

        super().__init__(problem)
        self.table = build_table(SamplerConfig())
        size = problem.shape[-1]
        diffusion = GaussianDiffusion(Wrapped(), image_size=size, objective="pred_noise", beta_schedule="linear")
        self.diffusion = diffusion.to(problem.device)
        self.sample(0)

    def sample(self, seed: int, steps: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(self.problem.shape, device=self.problem.device)
        for t in self.table.timestep[: steps or self.problem.steps].tolist():
            x, _ = self.diffusion.p_sample(x, t)
        return x

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(row)
        x_new, _ = self.diffusion.p_sample(x, int(self.table.timestep[row]))
        torch.manual_seed(row)
        return x_new, torch.randn_like(x)


def _update(x: Tensor, output: Tensor, z: Tensor, row: Tensor, clip: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take a step in plain PyTorch, without a value that the host waits for. Return x' and the next denoiser input."""
    a, b, c_x0, c_x, sigma = row.unbind()
    x0 = a * x + b * output.float()
    x0 = x0.clamp(-1, 1) if clip else x0
    x_new = c_x0 * x0 + c_x * x + sigma * z
    return x_new, x_new.to(dtype)


class _PlainArm(Arm):
    """An arm in plain PyTorch that never waits for the device: its table and its timesteps are on the device.

    Attributes:
        columns: The coefficients of all rows, float32 [steps, 5].
        times: The timesteps of all rows, int64 [steps, B].
        z: A buffer for noise.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        table, device = self.table, problem.device
        columns = torch.stack([torch.from_numpy(getattr(table, n)) for n in ("a", "b", "c_x0", "c_x", "sigma")], 1)
        self.columns = columns.float().to(device)
        self.times = torch.from_numpy(table.timestep).to(device)[:, None].expand(-1, problem.batch).contiguous()
        self.z = torch.zeros(problem.shape, device=device)


class Compiled(_PlainArm):
    """The network of diffusers through torch.compile, with a compiled step that does not wait for the device.

    Args:
        problem: The network and its settings.
        mode: The mode of torch.compile for the network.
        channels_last: Whether the network (a copy) and its input are in channels_last.
    """

    def __init__(self, problem: Problem, mode: str, channels_last: bool) -> None:
        super().__init__(problem)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = problem.model
        if channels_last:
            model = copy.deepcopy(model)
            model.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's types lack this form
        self.model = torch.compile(model, mode=mode, dynamic=False)
        self.update = torch.compile(_update, dynamic=False)
        self.row_columns, self.row_times = list(self.columns), list(self.times)
        self.sample(0)

    def sample(self, seed: int, steps: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(self.problem.shape, device=self.problem.device)
        model_input = self._model_input(x)
        with torch.no_grad():
            for row in range(steps or self.problem.steps):
                x, model_input = self._step(x, model_input, row)
        return x

    def _model_input(self, x: Tensor) -> Tensor:
        return x.to(self.problem.dtype, memory_format=self.memory_format, copy=True)

    def _step(self, x: Tensor, model_input: Tensor, row: int) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        output = tensor_of(self.model(model_input, self.row_times[row], **self.problem.kwargs))
        self.z.normal_()
        return self.update(
            x, output, self.z, self.row_columns[row], self.problem.config.clip_sample, self.problem.dtype
        )

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x_new, _ = self._step(x, self._model_input(x), row)
        return x_new.clone(), self.z


class GraphByHand(_PlainArm):
    """A CUDA graph of the unchanged network and of a step in plain PyTorch, as a user would write it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.x, self.model_input = torch.zeros_like(self.z), torch.zeros_like(self.z, dtype=problem.dtype)
        self.row = torch.zeros(1, dtype=torch.int64, device=problem.device)
        with torch.no_grad():
            self.graph = StepGraph(self._body, problem.device)

    def _body(self) -> None:
        row = self.row.clamp(max=len(self.table) - 1)
        times = self.times.index_select(0, row)[0]
        output = tensor_of(self.problem.model(self.model_input, times, **self.problem.kwargs))
        self.z.normal_()
        columns = self.columns.index_select(0, row)[0]
        x, model_input = _update(self.x, output, self.z, columns, self.problem.config.clip_sample, self.problem.dtype)
        self.x.copy_(x)
        self.model_input.copy_(model_input)
        self.row.add_(1)

    def _begin(self, x: Tensor, row: int) -> None:
        self.x.copy_(x)
        self.model_input.copy_(x)
        self.row.fill_(row)

    def sample(self, seed: int, steps: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        self._begin(torch.randn(self.problem.shape, device=self.problem.device), 0)
        for _ in range(steps or self.problem.steps):
            self.graph.replay()
        return self.x.clone()

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        self._begin(x, row)
        self.graph.replay()
        return self.x.clone(), self.z.clone()


SHIPPED, OURS, ALONE = "diffusers, as shipped", "ddpm_fast", "our network call alone"
COMPILED = "diffusers, torch.compile"
ARMS: dict[str, Callable[[Problem], Arm]] = {
    SHIPPED: Diffusers,
    OURS: partial(Ours, optimize="hoist"),
    f"{OURS}, channels_last": partial(Ours, optimize="hoist", memory_format="channels_last"),
    f"{OURS}, compiled": partial(Ours, optimize="hoist", compile=True),
    f"{OURS}, channels_last, compiled": partial(Ours, optimize="hoist", memory_format="channels_last", compile=True),
    f"{OURS}, fused": partial(Ours, optimize="fuse"),
    f"{OURS}, network as it is": partial(Ours, optimize=None),
    ALONE: partial(NetworkAlone, optimize="hoist"),
    "CUDA graph by hand": GraphByHand,
    "denoising-diffusion-pytorch": Lucidrains,
    **{
        f"{COMPILED} {mode}{', channels_last' if last else ''}": partial(Compiled, mode=mode, channels_last=last)
        for mode in ("default", "reduce-overhead", "max-autotune")
        for last in (False, True)
    },
}


def missing(arm: str, kind: Kind, device: torch.device) -> str | None:
    """Return why an arm cannot be built here, or None."""
    if arm == SHIPPED or arm.startswith(COMPILED):
        package = "diffusers"
    elif ARMS[arm] is Lucidrains:
        package = "denoising_diffusion_pytorch"
        if not kind.clip or kind.kwargs(1, torch.device("cpu")):
            return "samples without a condition and always clips"
    else:
        package = "torch"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if ARMS[arm] is GraphByHand and device.type != "cuda":
        return "needs a CUDA device"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of tracing and compiling."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
