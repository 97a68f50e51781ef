"""Measure the cost of sampling besides the network: the loop of each library against the accelerated loop.

    python -m benchmarks.libraries [--guided-diffusion CHECKOUT]

Both loops call the same network and draw the same noise. They take turns, so a machine that slows down slows both. The
sampler's time is the time of a whole call minus the time of the network, which times itself. Operations are counted as
torch dispatches them, without those of the network. The kernels and the host-device traffic of the originals are
counted on torch's meta device in place of a GPU. The command prints a table and writes
benchmarks/results/cpu__adapters.json.
"""

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

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from benchmarks.common.standins import stand_in_for_torchvision
from ddpm_fast import accelerate

LIMIT = 0.5  # of the ratio of the samplers' times, ours / theirs, at batch size 1
SIZE = 32
LINE = (
    "{library:27} {walk:16} {network:5} batch {batch:2}: {theirs_us:5.0f} -> {ours_us:4.0f} us, ratio {ratio:.2f} "
    "({ratio_lowest:.2f} to {ratio_highest:.2f}), end to end {end_to_end_ratio:.3f} (control {control_ratio:.3f}, "
    "to {control_highest:.3f}), hoisted {hoisted_end_to_end_ratio}, difference {largest_difference:.0e}"
)


class Light(nn.Module):
    """A network of one 1×1 convolution, beside which nearly all time is the sampler's.

    Attributes:
        seconds: The time spent in the network so far.
        counter: The counter that must not count the operations of the network.
        channels, out_dim, self_condition: Attributes that denoising-diffusion-pytorch reads.
    """

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__()
        self.channels = self.out_dim = 3
        self.self_condition = False
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
        """Return the output of the network, untimed."""
        output: Tensor = self.conv(x)
        return output


class Real(Light):
    """A small U-Net of diffusers that times itself."""

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__(out_channels)
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=SIZE, in_channels=3, out_channels=out_channels, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    def compute(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the output of the network, scaled down.

        Unscaled, a run with random weights is chaotic: roundings grow until no two runs agree.
        """
        output: Tensor = self.unet(x, t).sample
        return 0.05 * output


class Counter(TorchDispatchMode):
    """A counter of what torch dispatches.

    Attributes:
        operations: All operations.
        kernels: The operations that a GPU would run as a kernel.
        waits: The operations that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.kernels = self.waits = 0.0
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
        """Count nothing inside the block."""
        self.off = True
        yield
        self.off = False


@dataclass
class Case:
    """A way to sample with a library.

    Attributes:
        library: The name of the library.
        function: The name of the function that samples.
        steps: The number of steps of a run.
        make: A function from the network and the number of steps to the library's object.
        call: A function that samples: `call(object, network, batch, steps)`, for the original object and for the
            accelerated object alike.
        out_channels: The output channels of the network.
        batch: The batch size.
    """

    library: str
    function: str
    steps: int
    make: Callable[[Light, int], Any]
    call: Callable[[Any, Light, int, int], Any]
    out_channels: int = 3
    batch: int = 1


def diffusers_cases() -> list[Case]:
    """Return the cases of DDPMPipeline and DDIMPipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    def make(pipeline: Any, scheduler: Any) -> Callable[[Light, int], Any]:
        def build(network: Light, steps: int) -> Any:
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

    def call(pipeline: Any, network: Light, batch: int, steps: int) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipeline(batch_size=batch, num_inference_steps=steps, output_type="np").images)

    ancestral, implicit = make(DDPMPipeline, DDPMScheduler), make(DDIMPipeline, DDIMScheduler)
    return [
        Case("diffusers", "DDPMPipeline", 1000, ancestral, call),
        Case("diffusers", "DDIMPipeline", 250, implicit, call),
        Case("diffusers", "DDPMPipeline", 200, ancestral, call, batch=16),
    ]


def lucidrains_cases() -> list[Case]:
    """Return the cases of GaussianDiffusion with p_sample_loop and with ddim_sample."""
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion

    def build(ddim: bool) -> Callable[[Light, int], Any]:
        def make(network: Light, steps: int) -> Any:
            timesteps = {"timesteps": 1000, "sampling_timesteps": steps} if ddim else {"timesteps": steps}
            return GaussianDiffusion(network, image_size=SIZE, **timesteps).to(network.conv.weight.device)

        return make

    def call(diffusion: Any, network: Light, batch: int, steps: int) -> Any:
        return diffusion.sample(batch)

    return [
        Case("denoising-diffusion-pytorch", "sample, DDPM", 1000, build(False), call),
        Case("denoising-diffusion-pytorch", "sample, DDIM", 250, build(True), call),
        Case("denoising-diffusion-pytorch", "sample, DDPM", 200, build(False), call, batch=16),
    ]


def guided_cases(checkout: str) -> list[Case]:
    """Return the cases of guided-diffusion: p_sample_loop with learned variances, and ddim_sample_loop."""
    sys.path.insert(0, checkout)
    from guided_diffusion.script_util import create_gaussian_diffusion

    def make(network: Light, steps: int) -> Any:
        respacing = "" if steps == 1000 else str(steps)
        return create_gaussian_diffusion(steps=1000, learn_sigma=True, timestep_respacing=respacing)

    def call(name: str) -> Callable[[Any, Light, int, int], Any]:
        return lambda diffusion, network, batch, _: getattr(diffusion, name)(network, (batch, 3, SIZE, SIZE))

    return [
        Case("guided-diffusion", "p_sample_loop", 1000, make, call("p_sample_loop"), 6),
        Case("guided-diffusion", "ddim_sample_loop", 250, make, call("ddim_sample_loop"), 6),
        Case("guided-diffusion", "p_sample_loop", 200, make, call("p_sample_loop"), 6, batch=16),
    ]


def measure(case: Case, kind: type[Light], steps: int, rounds: int) -> Row:
    """Return the µs a step of both loops, medians over the rounds, and the ratios of the rounds."""
    network = kind(case.out_channels)
    original = case.make(network, steps)
    # The original stands twice: a difference between its two columns comes from the machine.
    objects = [original, accelerate(original, optimize=None), original]
    if kind is Real:
        objects.append(accelerate(original, optimize="hoist"))
    samplers: list[list[float]] = [[] for _ in objects]
    wholes: list[list[float]] = [[] for _ in objects]
    images: list[Any] = [None for _ in objects]
    for turn in range(rounds + 1):
        for which, each in enumerate(objects):
            torch.manual_seed(turn)
            network.seconds = 0.0
            began = time.perf_counter()
            images[which] = case.call(each, network, case.batch, steps)
            whole = time.perf_counter() - began
            if turn:  # the first round warms up
                wholes[which].append(whole)
                samplers[which].append(whole - network.seconds)
    sampler = [1e6 * statistics.median(times) / steps for times in samplers]
    ratios = [ours / others for others, ours, *_ in zip(*samplers, strict=True)]
    ends = [ours / others for others, ours, *_ in zip(*wholes, strict=True)]
    controls = [again / others for others, _, again, *_ in zip(*wholes, strict=True)]
    hoisted = [last / others for others, *_, last in zip(*wholes, strict=True)]
    return {
        "library": case.library,
        "walk": case.function,
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
    """Return what one step dispatches: the difference between a long run and a short run, divided by the steps."""
    counters = []
    for steps in (20, 40):
        network = Light(case.out_channels).to(device)
        original = case.make(network, steps)
        sampler = accelerate(original, optimize=None) if ours else original
        network.counter = counter = Counter()
        torch.manual_seed(0)
        with (
            contextlib.suppress(NotImplementedError),
            counter,
        ):  # images on meta cannot be fetched
            case.call(sampler, network, case.batch, steps)
        counters.append(counter)
    short, long = counters
    for name in ("operations", "kernels", "waits"):
        setattr(long, name, (getattr(long, name) - getattr(short, name)) / 20)
    return long


def half_precision(case: Case) -> dict[str, float]:
    """Return the largest difference to the images of a float32 network with a bfloat16 network: theirs and ours.

    All runs take 1000 steps with the same noise. diffusers rounds the state to the network's dtype after every step;
    the state of the engine stays float32.
    """
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm
    from diffusers.utils.torch_utils import randn_tensor

    def images(dtype: torch.dtype, wrap: Callable[[Any], Any] = lambda pipeline: pipeline) -> Tensor:
        network = Real().to(dtype)
        pipeline = case.make(network, 1000)
        pipeline.unet.to(dtype)
        torch.manual_seed(0)
        wrapped = wrap(pipeline)
        wrapped.set_progress_bar_config(disable=True)
        found: Tensor = wrapped(batch_size=4, num_inference_steps=1000, output_type="pt").images
        return found.float()

    def in_bfloat16(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        noise: Tensor = randn_tensor(*args, dtype=torch.bfloat16, **kwargs)
        return noise.to(dtype)

    with (  # torch draws other numbers in bfloat16 than in float32
        mock.patch.object(pipeline_ddpm, "randn_tensor", in_bfloat16),
        mock.patch.object(scheduling_ddpm, "randn_tensor", in_bfloat16),
    ):
        exact = images(torch.float32)
    theirs, ours = images(torch.bfloat16), images(torch.bfloat16, accelerate)
    return {"theirs": (theirs - exact).abs().max().item(), "ours": (ours - exact).abs().max().item()}


def draw_time(batch: int) -> float:
    """Return the µs of one draw of torch.randn, which both loops make at every step."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(100):
            torch.randn(batch, 3, SIZE, SIZE)
        times.append((time.perf_counter() - began) / 100)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--guided-diffusion", metavar="CHECKOUT", help="a checkout of openai/guided-diffusion")
    arguments = parser.parse_args()
    cases = [*diffusers_cases(), *lucidrains_cases()]
    versions = {name: version(name) for name in ("diffusers", "denoising-diffusion-pytorch")}
    if arguments.guided_diffusion:
        cases += guided_cases(arguments.guided_diffusion)
        head = subprocess.run(
            ["git", "-C", arguments.guided_diffusion, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        versions["guided-diffusion"] = head.stdout.strip()
    rows: list[Row] = []
    counts: list[Row] = []
    half = half_precision(cases[0])
    print("bfloat16, largest difference to float32: {theirs:.4f} -> {ours:.4f}".format(**half))
    with open(os.devnull, "w") as nowhere:
        for case in cases:
            with contextlib.redirect_stderr(nowhere):  # hides the progress bars of both
                rows.append(measure(case, Light, case.steps, rounds=7))
                if case.batch == 1:
                    rows.append(measure(case, Real, 100, rounds=9))
            if case.batch == 1:
                with contextlib.redirect_stderr(nowhere):
                    on_cpu = [count(case, ours, "cpu") for ours in (False, True)]
                    on_meta = count(case, False, "meta")
                counts.append({
                    "library": case.library,
                    "walk": case.function,
                    "theirs_operations": on_cpu[0].operations,
                    "ours_operations": on_cpu[1].operations,
                    "theirs_kernels": on_meta.kernels,
                    "theirs_waits": on_meta.waits,
                })  # fmt: skip
            for row in rows[-2 if case.batch == 1 else -1 :]:
                print(LINE.format(**row))
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
        sys.exit(f"{len(over)} rows are above their limit, {len(slower)} are slower end to end")
