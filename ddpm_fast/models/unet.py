"""A small U-Net for 2-D images (Ho et al. 2020, appendix B; scale-shift norm of Dhariwal & Nichol 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddpm_fast.validate import one_of, whole

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OtherSizes(TypedDict, total=False):
    """The fields of `UNetConfig` that the size of the images does not determine."""

    embedding: int
    heads: int
    groups: int
    learned_variance: bool
    num_classes: int | None


LARGEST = 2**14  # of any size of a network: what is more is a damaged file


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a `UNet`.

    Attributes:
        channels: Number of image channels.
        image_size: Side of the (square) image in pixels, divisible by 2^(levels - 1).
        widths: Number of channels of each resolution level, finest first.
        attention: One bool a level: True if the blocks of the level attend over all positions.
        embedding: Width of the timestep embedding.
        heads: Number of attention heads.
        groups: Number of groups of every GroupNorm.
        learned_variance: True if the output has twice the channels, the second half for the variance.
        num_classes: Number of classes of a class-conditional network. The label `num_classes` means "no class".
    """

    channels: int = 1
    image_size: int = 32
    widths: tuple[int, ...] = (32, 64, 96, 96)
    attention: tuple[bool, ...] = (False, False, True, True)
    embedding: int = 128
    heads: int = 4
    groups: int = 8
    learned_variance: bool = False
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("widths", "attention"):
            if not isinstance(getattr(self, name), Sequence):
                raise ValueError(f"{name} must have one entry a level, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("channels", "image_size", "embedding", "heads", "groups"):
            whole(name, getattr(self, name), 1, LARGEST)
        for width in self.widths:
            whole("widths", width, 1, LARGEST)
        one_of("learned_variance", self.learned_variance, (True, False))
        if self.num_classes is not None:
            whole("num_classes", self.num_classes, 1)
        for attend in self.attention:
            one_of("attention", attend, (True, False))
        if not self.widths or self.widths[0] % 2:
            raise ValueError(f"widths must have at least one level, the first even, got {self.widths}")
        if len(self.widths) != len(self.attention):
            raise ValueError(f"widths and attention must be equally long, got {self.widths} and {self.attention}")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size must be divisible by 2^(levels - 1), got {self.image_size}")
        if any(width % self.groups or width % self.heads for width in self.widths):
            raise ValueError(
                f"every width must be divisible by groups and heads, got {self.widths}, {self.groups}, {self.heads}"
            )

    @classmethod
    def for_images(
        cls, channels: int, image_size: int, widths: Sequence[int] | None = None, **fields: Unpack[OtherSizes]
    ) -> UNetConfig:
        """Return the sizes for images: up to four levels, down to 4 x 4 pixels, the lower half with attention."""
        levels = 1
        while levels < 4 and image_size % 2**levels == 0 and image_size // 2**levels >= 4:
            levels += 1
        widths = tuple(widths or cls.widths[:levels])
        attention = tuple(level >= len(widths) // 2 for level in range(len(widths)))
        return cls(channels=channels, image_size=image_size, widths=widths, attention=attention, **fields)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "widths": list(self.widths), "attention": list(self.attention)}


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of timesteps [B]: float32 [B, width] (Vaswani et al. 2017; Ho et al. 2020)."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = t.float()[:, None] * frequency
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class ResidualBlock(nn.Module):
    """A block of two 3x3 convolutions. The timestep scales and shifts between them."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(config.embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(config.groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and embedding [B, embedding] to [B, out_channels, H, W]."""
        scale, shift = rearrange(self.time(embedding), "b (two c) -> two b c 1 1", two=2)
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(torch.addcmul(shift, self.norm2(hidden), 1 + scale)))
        skip: Tensor = self.skip(x)
        return hidden + skip


class Attention(nn.Module):
    """A layer of self-attention over all positions of the image."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, channels, H, W] to the same shape."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n h c) y x -> n b h (y x) c", n=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "b h (y x) c -> b (h c) y x", y=x.shape[2])
        change: Tensor = self.out(mixed)
        return x + change


class Stage(nn.Module):
    """A residual block, followed by attention on levels that have it."""

    def __init__(self, in_channels: int, out_channels: int, attend: bool, config: UNetConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, config)
        self.attend = Attention(out_channels, config) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and embedding [B, embedding] to [B, out_channels, H, W]."""
        output: Tensor = self.attend(self.block(x, embedding))
        return output


class UNet(nn.Module):
    """A noise-prediction network: model(x, t) maps x [B, C, H, W] and t [B] (integers or floats) to [B, C, H, W].

    With a learned variance the output is [B, 2C, H, W]. With classes the call is model(x, t, class_labels), with labels
    int64 [B] in 0 … num_classes. The last label means "no class" and is the default (Ho & Salimans 2022).
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        widths = config.widths
        self.embed = nn.Sequential(
            nn.Linear(widths[0], config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        if config.num_classes is not None:
            self.embed_class = nn.Embedding(config.num_classes + 1, config.embedding)
            nn.init.normal_(self.embed_class.weight, std=0.02)
        self.enter = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            above = widths[min(level + 1, len(widths) - 1)]
            self.down.append(Stage(below, width, config.attention[level], config))
            self.up.append(Stage(above + width, width, config.attention[level], config))
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = Stage(widths[-1], widths[-1], True, config)
        self.leave = nn.Sequential(
            nn.GroupNorm(config.groups, widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], config.channels * (2 if config.learned_variance else 1), 3, padding=1),
        )
        nn.init.zeros_(self.leave[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.leave[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise in x [B, C, H, W] at timesteps t [B]. H and W must be divisible by 2^(levels - 1)."""
        channels, unit = self.config.channels, 2 ** len(self.shrink)
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % unit or x.shape[3] % unit:
            raise ValueError(
                f"x must be [B, {channels}, H, W] with H and W divisible by {unit}, got shape {tuple(x.shape)}"
            )
        embedding = self.embed(timestep_embedding(t, self.config.widths[0]).to(self.enter.weight.dtype))
        if self.config.num_classes is not None:
            if class_labels is None:
                class_labels = torch.full((len(x),), self.config.num_classes, dtype=torch.int64, device=x.device)
            embedding = embedding + self.embed_class(class_labels)
        elif class_labels is not None:
            raise ValueError("the network knows no classes, got class_labels")
        embedding = F.silu(embedding)
        x = self.enter(x)
        skips = []
        for level, stage in enumerate(self.down):
            x = stage(x, embedding)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        x = self.middle(x, embedding)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([x, skips[level]], dim=1), embedding)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        output: Tensor = self.leave(x)
        return output
