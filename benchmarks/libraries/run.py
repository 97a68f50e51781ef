"""What sampling costs besides the network: each library's own loop against the accelerated one, in one run.

    python -m benchmarks.libraries [--guided-diffusion CHECKOUT]

Both call the same network and draw the same noise. The two walk in turn, so that a machine that slows down slows both;
sampler time is a whole call minus the network's, which times itself. Operations are counted as they are dispatched,
the network's left out; kernels and host-device traffic of the originals on torch's meta device in place of a GPU.
Prints a table and writes benchmarks/results/cpu__adapters.json.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.results import write_result
from benchmarks.common.standins import stand_in_for_torchvision
from ddpm_fast import accelerate

LIMIT = 0.5  # sampler time, ours / theirs, at batch 1
SIZE = 32
SAID = (
    "{library:27} {walk:16} {network:5} batch {batch:2}: {theirs_us:5.0f} -> {ours_us:4.0f} us, ratio {ratio:.2f} "
    "({ratio_lowest:.2f} to {ratio_highest:.2f}), end to end {end_to_end_ratio:.3f} (control {control_ratio:.3f}, "
    "to {control_highest:.3f}), hoisted {hoisted_end_to_end_ratio}, difference {largest_difference:.0e}"
)


class Light(nn.Module):
    """The smallest network there is, so that nearly all is the sampler; adds up the time spent in it."""

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, out_channels, 1)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.seconds = 0.0
        self.counter: Counter | None = None

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        with self.counter.paused() if self.counter else contextlib.nullcontext():
            output = self.compute(x, t)
        self.seconds += time.perf_counter() - began
        return output

    def compute(self, x: Tensor, t: Tensor) -> Tensor:
        """The network itself."""
        return self.conv(x)


class Real(Light):
    """A U-Net of diffusers."""

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__(out_channels)
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=SIZE, in_channels=3, out_channels=out_channels, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    def compute(self, x: Tensor, t: Tensor) -> Tensor:
        """The network itself; small, since walks with random weights are chaotic and no two roundings meet."""
        return 0.05 * self.unet(x, t).sample


class Counter(TorchDispatchMode):
    """Counts what torch dispatches: all operations, those that a GPU would run as a kernel, and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.kernels = self.waits = 0
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.off:
            return result
        name = func.overloadpacket.__name__
        self.operations += 1
        returned = [r.alias_info for r in func._schema.returns]
        view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors)
        if name == "_local_scalar_dense" or (
            name in ("_to_copy", "copy_") and len({tensor.device for tensor in tensors}) > 1
        ):
            self.waits += 1
        elif on_accelerator and not view and not name.startswith("empty"):
            self.kernels += 1
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside."""
        self.off = True
        yield
        self.off = False


@dataclass
class Case:
    """One way to sample: `call(obj, network, batch, steps)` for the original and the accelerated object alike."""

    library: str
    walk: str
    steps: int
    make: Callable[[nn.Module, int], Any]
    call: Callable[[Any, nn.Module, int, int], Any]
    out_channels: int = 3
    batch: int = 1


def diffusers_cases() -> list[Case]:
    """DDPMPipeline and DDIMPipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    def make(pipeline: Any, scheduler: Any) -> Callable[[nn.Module, int], Any]:
        def build(network: nn.Module, steps: int) -> Any:
            unet = UNet2DModel(
                sample_size=SIZE, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            unet.forward = lambda x, t, class_labels=None, return_dict=True: (
                UNet2DOutput(network(x, t)) if return_dict else (network(x, t),)
            )
            made = pipeline(unet.to(network.conv.weight.device), scheduler())
            made.set_progress_bar_config(disable=True)
            return made

        return build

    def call(pipeline: Any, network: nn.Module, batch: int, steps: int) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipeline(batch_size=batch, num_inference_steps=steps, output_type="np").images)

    ancestral, implicit = make(DDPMPipeline, DDPMScheduler), make(DDIMPipeline, DDIMScheduler)
    return [
        Case("diffusers", "DDPMPipeline", 1000, ancestral, call),
        Case("diffusers", "DDIMPipeline", 250, implicit, call),
        Case("diffusers", "DDPMPipeline", 200, ancestral, call, batch=16),
    ]


def lucidrains_cases() -> list[Case]:
    """GaussianDiffusion by p_sample_loop and by ddim_sample."""
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion

    def build(ddim: bool) -> Callable[[nn.Module, int], Any]:
        def make(network: nn.Module, steps: int) -> Any:
            network.channels = network.out_dim = 3
            network.self_condition = False
            timesteps = {"timesteps": 1000, "sampling_timesteps": steps} if ddim else {"timesteps": steps}
            return GaussianDiffusion(network, image_size=SIZE, **timesteps).to(network.conv.weight.device)

        return make

    def call(diffusion: Any, network: nn.Module, batch: int, steps: int) -> Any:
        return diffusion.sample(batch)

    return [
        Case("denoising-diffusion-pytorch", "sample, DDPM", 1000, build(False), call),
        Case("denoising-diffusion-pytorch", "sample, DDIM", 250, build(True), call),
        Case("denoising-diffusion-pytorch", "sample, DDPM", 200, build(False), call, batch=16),
    ]


def guided_cases(checkout: str) -> list[Case]:
    """guided-diffusion's p_sample_loop with learned variances, and ddim_sample_loop."""
    sys.path.insert(0, checkout)
    from guided_diffusion.script_util import create_gaussian_diffusion

    def make(network: nn.Module, steps: int) -> Any:
        respacing = "" if steps == 1000 else str(steps)
        return create_gaussian_diffusion(steps=1000, learn_sigma=True, timestep_respacing=respacing)

    def walk(name: str) -> Callable[..., Any]:
        return lambda diffusion, network, batch, _: getattr(diffusion, name)(network, (batch, 3, SIZE, SIZE))

    return [
        Case("guided-diffusion", "p_sample_loop", 1000, make, walk("p_sample_loop"), 6),
        Case("guided-diffusion", "ddim_sample_loop", 250, make, walk("ddim_sample_loop"), 6),
        Case("guided-diffusion", "p_sample_loop", 200, make, walk("p_sample_loop"), 6, batch=16),
    ]


def measure(case: Case, kind: type[Light], steps: int, rounds: int) -> dict[str, Any]:
    """Times of both, µs a step, median over the rounds; and the ratios of the rounds."""
    network = kind(case.out_channels)
    theirs = case.make(network, steps)
    walkers = [
        theirs,
        accelerate(theirs, optimize=None),
        theirs,
    ]  # the original twice: what differs there is the machine
    if kind is Real:
        walkers.append(accelerate(theirs, optimize="hoist"))
    samplers: list[list[float]] = [[] for _ in walkers]
    wholes: list[list[float]] = [[] for _ in walkers]
    images: list[Any] = [None for _ in walkers]
    for turn in range(rounds + 1):
        for which, one in enumerate(walkers):
            torch.manual_seed(turn)
            network.seconds = 0.0
            began = time.perf_counter()
            images[which] = case.call(one, network, case.batch, steps)
            whole = time.perf_counter() - began
            if turn:  # the first warms up
                wholes[which].append(whole)
                samplers[which].append(whole - network.seconds)
    sampler = [1e6 * statistics.median(times) / steps for times in samplers]
    ratios = [ours / others for others, ours, *_ in zip(*samplers, strict=True)]
    ends = [ours / others for others, ours, *_ in zip(*wholes, strict=True)]
    controls = [again / others for others, _, again, *_ in zip(*wholes, strict=True)]
    hoisted = [last / others for others, *_, last in zip(*wholes, strict=True)]
    return {
        "library": case.library,
        "walk": case.walk,
        "network": kind.__name__.lower(),
        "batch": case.batch,
        "steps": steps,
        "rounds": rounds,
        "theirs_us": sampler[0],
        "ours_us": sampler[1],
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "limit": LIMIT if case.batch == 1 and kind is Light else None,
        "end_to_end_ratio": statistics.median(ends),
        "hoisted_end_to_end_ratio": statistics.median(hoisted) if kind is Real else None,
        "control_ratio": statistics.median(controls),
        "control_highest": max(controls),
        "largest_difference": max((images[0] - other).abs().max().item() for other in images[1:]),
    }


def count(case: Case, ours: bool, device: str) -> Counter:
    """What one step dispatches: the difference of a long walk and a short one, a step."""
    found = []
    for steps in (20, 40):
        network = Light(case.out_channels).to(device)
        obj = case.make(network, steps)
        obj = accelerate(obj, optimize=None) if ours else obj
        if not ours or device == "cpu":
            with contextlib.suppress(NotImplementedError):  # images of the meta device cannot be fetched at the end
                torch.manual_seed(0)
                with Counter() as counter:
                    network.counter = counter
                    case.call(obj, network, case.batch, steps)
        found.append(counter)
    short, long = found
    for name in ("operations", "kernels", "waits"):
        setattr(long, name, (getattr(long, name) - getattr(short, name)) / 20)
    return long


def half_precision(case: Case) -> dict[str, float]:
    """Largest difference to the images of float32 after 1000 steps, the network in bfloat16 and the noise the same.

    diffusers rounds the state to the network's dtype after every step; the engine's stays float32.
    """
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm
    from diffusers.utils.torch_utils import randn_tensor

    def images(dtype: torch.dtype, wrap: Callable[[Any], Any] = lambda pipeline: pipeline) -> Tensor:
        network = Real().to(dtype)
        pipeline = case.make(network, 1000)
        pipeline.unet.to(dtype)
        torch.manual_seed(0)
        fast = wrap(pipeline)
        fast.set_progress_bar_config(disable=True)
        return fast(batch_size=4, num_inference_steps=1000, output_type="pt").images.float()

    def in_bfloat16(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        return randn_tensor(*args, dtype=torch.bfloat16, **kwargs).to(dtype)

    with (  # other numbers than in float32
        mock.patch.object(pipeline_ddpm, "randn_tensor", in_bfloat16),
        mock.patch.object(scheduling_ddpm, "randn_tensor", in_bfloat16),
    ):
        exact = images(torch.float32)
    theirs, ours = images(torch.bfloat16), images(torch.bfloat16, accelerate)
    return {"theirs": (theirs - exact).abs().max().item(), "ours": (ours - exact).abs().max().item()}


def draw_time(batch: int) -> float:
    """µs of one draw of torch.randn, which both sides make at every step."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(100):
            torch.randn(batch, 3, SIZE, SIZE)
        times.append((time.perf_counter() - began) / 100)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided-diffusion", metavar="CHECKOUT", help="of openai/guided-diffusion")
    arguments = parser.parse_args()
    cases = [*diffusers_cases(), *lucidrains_cases()]
    versions = {name: version(name) for name in ("diffusers", "denoising-diffusion-pytorch")}
    if arguments.guided_diffusion:
        cases += guided_cases(arguments.guided_diffusion)
        said = subprocess.run(
            ["git", "-C", arguments.guided_diffusion, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        versions["guided-diffusion"] = said.stdout.strip()
    rows, counts = [], []
    half = half_precision(cases[0])
    print("bfloat16, largest difference to float32: {theirs:.4f} -> {ours:.4f}".format(**half))
    with open(os.devnull, "w") as nowhere:
        for case in cases:
            with contextlib.redirect_stderr(nowhere):  # the progress bars of both
                rows.append(measure(case, Light, case.steps, rounds=7))
                if case.batch == 1:
                    rows.append(measure(case, Real, 100, rounds=9))
            if case.batch == 1:
                with contextlib.redirect_stderr(nowhere):
                    on_cpu = [count(case, ours, "cpu") for ours in (False, True)]
                    elsewhere = count(case, False, "meta")
                counts.append({
                    "library": case.library,
                    "walk": case.walk,
                    "theirs_operations": on_cpu[0].operations,
                    "ours_operations": on_cpu[1].operations,
                    "theirs_kernels": elsewhere.kernels,
                    "theirs_waits": elsewhere.waits,
                })  # fmt: skip
            for row in rows[-2 if case.batch == 1 else -1 :]:
                print(SAID.format(**row))
    for row in counts:
        print(
            "{library:28} {walk:17} operations {theirs_operations:5.1f} -> {ours_operations:4.1f}; on a GPU "
            "{theirs_kernels:.1f} kernels and {theirs_waits:.1f} waits".format(**row)
        )
    path = write_result(
        "cpu__adapters",
        rows,
        versions=versions,
        counts=counts,
        bfloat16_difference=half,
        randn_us={batch: draw_time(batch) for batch in (1, 16)},
    )
    print(path)
    over = [row for row in rows if row["limit"] and row["ratio"] > row["limit"]]
    slower = [
        row
        for row in rows
        for ratio in (row["end_to_end_ratio"], row["hoisted_end_to_end_ratio"])
        if ratio is not None and ratio > max(1, row["control_highest"])
    ]
    if over or slower:
        sys.exit(f"{len(over)} above their limit, {len(slower)} slower end to end")
