"""The networks of the whole runs: configurations that people use, with random weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.config import SamplerConfig

CIFAR = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "downsample_padding": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None,
    "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip
CELEBA = {
    **CIFAR, "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}  # fmt: skip
# As many parameters as the embedded network.
MOONS = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 64), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 8,
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}  # fmt: skip
TINY = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
DIT_XL_2 = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip


class HalfDiT(nn.Module):
    """A DiT that returns only the half of its output that its pipeline uses."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.dit = DiTTransformer2DModel(**config)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        output: Tensor = self.dit(x, t, class_labels=class_labels).sample
        return output[:, : x.shape[1]]


class Dot(nn.Module):
    """A network of four operations: a convolution that is scaled by a function of t."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale: Tensor = self.scale(t[:, None].to(x.dtype) / 1000)
        return torch.tanh(self.convolution(x) * scale[:, :, None, None])


def _unet(config: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from diffusers import UNet2DModel

        network: nn.Module = UNet2DModel(**config)
        return network

    return make


def _nothing(batch: int, device: torch.device) -> dict[str, Tensor]:
    return {}


def _classes(batch: int, device: torch.device) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(batch, device=device) * 37 % 1000}


@dataclass(frozen=True)
class Kind:
    """A network that can be built.

    Attributes:
        title: A full description.
        short: The name in tables.
        make: A function that builds the network.
        shape: Shape of a sample, (C, H, W).
        kwargs: A function from the batch size and the device to the keywords of the network.
        clip: Whether samples are images on [-1, 1], so that the x0 prediction is clipped.
    """

    title: str
    short: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    kwargs: Callable[[int, torch.device], dict[str, Tensor]] = _nothing
    clip: bool = True


KINDS = {
    "cifar": Kind("UNet2DModel of google/ddpm-cifar10-32", "CIFAR-10 U-Net", _unet(CIFAR), (3, 32, 32)),
    "256": Kind("UNet2DModel of google/ddpm-celebahq-256", "256 x 256 U-Net", _unet(CELEBA), (3, 256, 256)),
    "dit": Kind(
        "DiT-XL/2, latents of 256 x 256 images",
        "DiT-XL/2",
        lambda: HalfDiT(**DIT_XL_2),
        (4, 32, 32),
        _classes,
        clip=False,
    ),
    "moons": Kind("UNet2DModel of the embedded network's size", "U-Net, 1.6 M", _unet(MOONS), (1, 32, 32)),
    "tiny": Kind("a tiny UNet2DModel", "tiny", _unet(TINY), (3, 8, 8)),
    "dot": Kind("a convolution", "dot", Dot, (3, 8, 8)),
}


@dataclass
class Problem:
    """One network at one batch size and precision. Every arm of a part has an equal problem.

    Attributes:
        kind: The network.
        batch: The batch size.
        precision: "float32", "tf32" or "bfloat16".
        steps: The number of steps of a run.
        device: The device of the network.
        exact: The network in float32. The gate compares with it.
        model: The network in the dtype of the precision. An arm must not change it.
        kwargs: The keywords of the network.
        config: DDPM with 1000 linear betas, of which a run takes `steps`.
    """

    kind: Kind
    batch: int
    precision: str
    steps: int
    device: torch.device
    exact: nn.Module = field(init=False)
    model: nn.Module = field(init=False)
    kwargs: dict[str, Tensor] = field(init=False)
    config: SamplerConfig = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        with self.device:  # weights are drawn there, which is much faster on a GPU
            exact = self.kind.make()
        self.exact = exact.eval().requires_grad_(False).to(self.device)
        self.model = copy.deepcopy(self.exact).to(self.dtype)
        self.kwargs = self.kind.kwargs(self.batch, self.device)
        self.config = SamplerConfig(num_inference_steps=self.steps, clip_sample=self.kind.clip)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the batch."""
        return (self.batch, *self.kind.shape)


def cost(kind: Kind, batch: int) -> tuple[int, int]:
    """Return the parameters of a network, and the floating point operations of a call, without running the network.

    A multiplication with an addition counts as two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device("meta")
    with device, torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = kind.make().eval()
        network(torch.zeros(1, *kind.shape), torch.zeros(1, dtype=torch.int64), **kind.kwargs(1, device))
    return sum(parameter.numel() for parameter in network.parameters()), batch * int(counter.get_total_flops())


def tensor_of(output: Any) -> Tensor:
    """Return the tensor of a network's output, which is the tensor itself or an object with `.sample`."""
    tensor: Tensor = output if isinstance(output, Tensor) else output.sample
    return tensor
