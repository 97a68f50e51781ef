"""The arms of `walks.py`: ways to walk through a diffusion model, and the gate that each has to pass.

An arm is built once, compilation and capture included, then walks many times. The gate takes single steps of the very
thing that walks, at rows all over the table, and compares them with the network in float32 followed by the posterior in
float64, with the noise that the arm drew.
"""

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.standins import stand_in_for_torchvision
from benchmarks.walks.networks import Problem, tensor_of
from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.execution import tf32
from ddpm_fast.engine.graph import StepGraph
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.sample import Sampler
from ddpm_fast.seeding import resolve_seeds, seed_tensor
from ddpm_fast.table import StepTable, build_table

# Largest error of the network's output, as a share of the largest output.
NETWORK_ERROR = {"float32": 2e-4, "tf32": 1e-2, "bfloat16": 5e-2}
STATE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
Step = tuple[int, Tensor, Tensor, Tensor]  # row, x, x', z


class WrongStepError(Exception):
    """An arm does not take the steps that it should."""


class Arm:
    """A way to walk.

    Attributes:
        table: the rows that it walks.
        state_dtype: of x between two steps.
    """

    state_dtype = torch.float32

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.table = build_table(problem.config)

    def walk(self, seed: int, steps: int | None = None) -> Tensor | None:
        """x_0 on the device, [B, C, H, W]; may return before the device is done. With `steps`, the first ones only."""
        raise NotImplementedError

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """One step from x at a row of the table: x', and the noise in it."""
        raise NotImplementedError

    def steps(self, rows: list[int]) -> Iterator[Step]:
        """A step at each row."""
        for row in rows:
            generator = torch.Generator().manual_seed(row)
            x = torch.randn(self.problem.shape, generator=generator).bfloat16().float().to(self.problem.device)
            x_new, z = self.step(x, row)
            yield row, x, x_new, z


def check(arm: Arm) -> float:
    """The largest error of an arm's steps, as a share of what rounding explains; raise WrongStepError above 1."""
    problem, table = arm.problem, arm.table
    walked = problem.steps
    rows = sorted({0, walked // 4, walked // 2, 3 * walked // 4, walked - 1})
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
    """x_{t-1}, in float64 (Ho et al. 2020, eq. 7 and 15)."""
    x0 = float(table.a[row]) * x + float(table.b[row]) * output
    x0 = x0.clamp(-1, 1) if clip else x0
    return float(table.c_x0[row]) * x0 + float(table.c_x[row]) * x + float(table.sigma[row]) * z


class Ours(Arm):
    """ddpm_fast.

    Args:
        how: options of the Sampler.
    """

    def __init__(self, problem: Problem, **how: Any) -> None:
        super().__init__(problem)
        self.sampler = Sampler(
            problem.model,
            problem.shape,
            model_kwargs=problem.kwargs,
            config=problem.config,
            device=problem.device,
            **how,
        )
        self.walk(0)

    def walk(self, seed: int, steps: int | None = None) -> Tensor:
        return self.sampler(seeds=seed, progress=False)

    def steps(self, rows: list[int]) -> Iterator[Step]:
        seeds = seed_tensor(resolve_seeds(1, self.problem.batch)).to(self.problem.device)
        start = torch.randn(self.problem.shape, generator=torch.Generator().manual_seed(0)).to(self.problem.device)
        kept = sorted({kept for row in rows for kept in (row - 1, row) if kept >= 0})
        frames = self.sampler(seeds=1, x_T=start, output="trajectory", output_steps=kept, progress=False).frames
        after = dict(zip(kept, frames, strict=True)) | {-1: start}
        for row in rows:
            ids = torch.full_like(seeds, int(self.table.noise_id[row]))
            z = normal(seeds, ids, Stream.STEP, self.problem.shape[1:])
            yield row, after[row - 1], after[row], z


class NetworkAlone(Arm):
    """No sampler: our network call without the step, replayed as often."""

    def __init__(self, problem: Problem, **how: Any) -> None:
        super().__init__(problem)
        self.network = Ours(problem, **how).sampler.loop.network
        on_cpu = problem.device.type == "cpu"
        self.call: Callable[[], Any] = (
            (lambda: self.network(0)) if on_cpu else StepGraph(self.network, problem.device).replay
        )

    def walk(self, seed: int, steps: int | None = None) -> None:
        with torch.no_grad():
            for _ in range(self.problem.steps):
                self.call()


class Diffusers(Arm):
    """Its pipeline as it is shipped; for a transformer the same loop without the pipeline's decoder."""

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
        self.walk(0)

    def walk(self, seed: int, steps: int | None = None) -> Tensor:
        problem = self.problem
        generator = torch.Generator(problem.device).manual_seed(seed)
        if self.pipeline is not None:
            images = self.pipeline(problem.batch, generator, steps or problem.steps, output_type="pt").images
            self.scheduler.set_timesteps(problem.steps)
            return 2 * images - 1
        x = torch.randn(problem.shape, generator=generator, device=problem.device, dtype=problem.dtype)
        with torch.no_grad():
            for t in self.scheduler.timesteps[:steps]:
                x = self.scheduler.step(self._network(x, t), t, x, generator=generator).prev_sample
        return x

    def _network(self, x: Tensor, t: Tensor) -> Tensor:
        if self.pipeline is not None:
            return self.problem.model(x, t).sample
        return self.problem.model(x, t.to(x.device).expand(len(x)), **self.problem.kwargs)

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        x = x.to(self.state_dtype)
        t = self.scheduler.timesteps[row]
        generator = torch.Generator(x.device).manual_seed(row)
        with torch.no_grad():
            x_new = self.scheduler.step(self._network(x, t), t, x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=generator.manual_seed(row), device=x.device, dtype=x.dtype)
        return x_new, z


class Lucidrains(Arm):
    """denoising-diffusion-pytorch's loop around the same network; where a walk is shorter, its first steps."""

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
        self.walk(0)

    def walk(self, seed: int, steps: int | None = None) -> Tensor:
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
    """A step in plain PyTorch, without a value that the host waits for; x', and what the network reads next."""
    a, b, c_x0, c_x, sigma = row.unbind()
    x0 = a * x + b * output.float()
    x0 = x0.clamp(-1, 1) if clip else x0
    x_new = c_x0 * x0 + c_x * x + sigma * z
    return x_new, x_new.to(dtype)


class _Plain(Arm):
    """What the rivals that do not wait share: the table and the timesteps on the device."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        table, device = self.table, problem.device
        columns = torch.stack([torch.from_numpy(getattr(table, n)) for n in ("a", "b", "c_x0", "c_x", "sigma")], 1)
        self.columns = columns.float().to(device)
        self.times = torch.from_numpy(table.timestep).to(device)[:, None].expand(-1, problem.batch).contiguous()
        self.z = torch.zeros(problem.shape, device=device)


class Compiled(_Plain):
    """diffusers' network through torch.compile, with a compiled step that does not wait for the device.

    Args:
        mode: of torch.compile for the network.
        channels_last: whether the network (a copy) and its input are in channels_last.
    """

    def __init__(self, problem: Problem, mode: str, channels_last: bool) -> None:
        super().__init__(problem)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = copy.deepcopy(problem.model).to(memory_format=self.memory_format) if channels_last else problem.model
        self.model = torch.compile(model, mode=mode, dynamic=False)
        self.update = torch.compile(_update, dynamic=False)
        self.rows, self.each = list(self.columns), list(self.times)
        self.walk(0)

    def walk(self, seed: int, steps: int | None = None) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(self.problem.shape, device=self.problem.device)
        entered = self._entered(x)
        with torch.no_grad():
            for row in range(steps or self.problem.steps):
                x, entered = self._step(x, entered, row)
        return x

    def _entered(self, x: Tensor) -> Tensor:
        return x.to(self.problem.dtype, memory_format=self.memory_format, copy=True)

    def _step(self, x: Tensor, entered: Tensor, row: int) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        output = tensor_of(self.model(entered, self.each[row], **self.problem.kwargs))
        self.z.normal_()
        return self.update(x, output, self.z, self.rows[row], self.problem.config.clip_sample, self.problem.dtype)

    def step(self, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x_new, _ = self._step(x, self._entered(x), row)
        return x_new.clone(), self.z


class GraphByHand(_Plain):
    """A CUDA graph of the network as it is and a step in plain PyTorch, as one would write it for oneself."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.x, self.entered = torch.zeros_like(self.z), torch.zeros_like(self.z, dtype=problem.dtype)
        self.row = torch.zeros(1, dtype=torch.int64, device=problem.device)
        with torch.no_grad():
            self.graph = StepGraph(self._body, problem.device)

    def _body(self) -> None:
        row = self.row.clamp(max=len(self.table) - 1)
        times = self.times.index_select(0, row)[0]
        output = tensor_of(self.problem.model(self.entered, times, **self.problem.kwargs))
        self.z.normal_()
        columns = self.columns.index_select(0, row)[0]
        x, entered = _update(self.x, output, self.z, columns, self.problem.config.clip_sample, self.problem.dtype)
        self.x.copy_(x)
        self.entered.copy_(entered)
        self.row.add_(1)

    def _begin(self, x: Tensor, row: int) -> None:
        self.x.copy_(x)
        self.entered.copy_(x)
        self.row.fill_(row)

    def walk(self, seed: int, steps: int | None = None) -> Tensor:
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
HOISTED = {"optimize": "hoist"}
ARMS: dict[str, Callable[[Problem], Arm]] = {
    SHIPPED: Diffusers,
    OURS: lambda problem: Ours(problem, **HOISTED),
    f"{OURS}, layout by trial": lambda problem: Ours(problem, **HOISTED, memory_format="auto"),
    f"{OURS}, layout by trial, compiled": lambda problem: Ours(problem, **HOISTED, memory_format="auto", compile=True),
    f"{OURS}, network as it is": lambda problem: Ours(problem, optimize=None),
    ALONE: lambda problem: NetworkAlone(problem, **HOISTED),
    "CUDA graph by hand": GraphByHand,
    "denoising-diffusion-pytorch": Lucidrains,
    **{
        f"{COMPILED} {mode}{', channels_last' if last else ''}": (
            lambda problem, mode=mode, last=last: Compiled(problem, mode, last)
        )
        for mode in ("default", "reduce-overhead", "max-autotune")
        for last in (False, True)
    },
}


def missing(arm: str, problem: Problem) -> str | None:
    """Why an arm cannot be built here, or None."""
    if arm == SHIPPED or arm.startswith(COMPILED):
        package = "diffusers"
    elif ARMS[arm] is Lucidrains:
        package = "denoising_diffusion_pytorch"
        if problem.kwargs or not problem.config.clip_sample:
            return "walks unconditionally, and clips"
    else:
        package = "torch"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if ARMS[arm] is GraphByHand and problem.device.type != "cuda":
        return "needs a CUDA device"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what tracing and compiling warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
