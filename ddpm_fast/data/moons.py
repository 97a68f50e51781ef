"""Moon phases: an endless procedural data set of small grey images, and the ruler that measures them.

A moon is a disc of radius R (pixels) at (x, y), lit from the left or from the right. On the line at
height v above the centre the disc spans |u| <= h with h = sqrt(R^2 - v^2), and the sunlit part of a
moon lit from the right is u > (1 - 2 f) h: the terminator is half an ellipse, and the lit share of
the area is exactly f. Sky is -1, the lit part +1, the unlit part of the disc faintly visible at
`EARTHSHINE`, so that the radius can be read off every phase.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.seeding import keyed_generator

DATA_STREAM = 1
SIZE = 32
EARTHSHINE = -0.6
RADIUS_RANGE = (5.0, 11.0)
MARGIN = 1.0  # pixels of sky that stay free around every disc
SUB_ROWS = 8  # lines a pixel is cut into; along a line the coverage is exact


@dataclass(frozen=True)
class Moons:
    """Parameters of N moons, each a float32 tensor of shape [N].

    Attributes:
        lit: lit fraction of the disc's area, in [0, 1].
        side: +1 where the right limb is lit, -1 where the left one is.
        x, y: centre in pixels from the image's upper left corner.
        radius: in pixels.
    """

    lit: Tensor
    side: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor


def draw_parameters(count: int, generator: torch.Generator | None = None) -> Moons:
    """Draw `count` moons: lit ~ U[0, 1], side fair, radius ~ U(RADIUS_RANGE), centre uniform inside the sky."""
    u = torch.rand(5, count, generator=generator)
    low, high = RADIUS_RANGE
    radius = low + (high - low) * u[2]
    reach = SIZE - 2 * (radius + MARGIN)
    return Moons(
        lit=u[0],
        side=torch.where(u[1] < 0.5, -1.0, 1.0),
        x=radius + MARGIN + reach * u[3],
        y=radius + MARGIN + reach * u[4],
        radius=radius,
    )


def render(moons: Moons) -> Tensor:
    """Draw anti-aliased images of the given moons: float32 [N, 1, SIZE, SIZE] in [-1, 1]."""
    line = (torch.arange(SIZE * SUB_ROWS) + 0.5) / SUB_ROWS
    v = line - moons.y[:, None]  # [N, lines]
    half = (moons.radius[:, None].square() - v.square()).clamp(min=0).sqrt()
    terminator = (1 - 2 * moons.lit)[:, None] * half
    right = (moons.side > 0)[:, None]
    disc = _coverage(moons.x[:, None] - half, moons.x[:, None] + half)
    lit = _coverage(
        moons.x[:, None] + torch.where(right, terminator, -half),
        moons.x[:, None] + torch.where(right, half, -terminator),
    )
    return (-1 + (EARTHSHINE + 1) * disc + (1 - EARTHSHINE) * lit)[:, None]


def _coverage(start: Tensor, end: Tensor) -> Tensor:
    """Share of every pixel that the intervals [start, end] of its lines cover: [N, lines] -> [N, SIZE, SIZE]."""
    left = torch.arange(SIZE, dtype=start.dtype)
    overlap = torch.minimum(end[..., None], left + 1) - torch.maximum(start[..., None], left)
    return overlap.clamp(0, 1).unflatten(1, (SIZE, SUB_ROWS)).mean(2)


def batch(count: int, seed: int, index: int = 0) -> Tensor:
    """Images of batch `index` of the endless set `seed`: float32 [count, 1, 32, 32] in [-1, 1].

    A batch depends on (count, seed, index) alone, so a training that resumes sees what it would have seen.
    """
    return render(draw_parameters(count, keyed_generator(DATA_STREAM, seed, index)))


def measure(images: Tensor) -> Moons:
    """Read the parameters back off images [N, 1, SIZE, SIZE], whatever drew them.

    The disc is what is brighter than halfway between sky and earthshine; the lit area is the
    brightness above earthshine. On the data itself the lit fraction is recovered to 0.02 and the
    radius to 0.15 pixels (tests/test_moons.py). An image without a disc gives radius 0 and NaN elsewhere.
    """
    pixels = images[:, 0].float().clamp(-1, 1)
    disc = (pixels > (EARTHSHINE - 1) / 2).float()
    area = disc.sum((1, 2))
    glow = ((pixels - EARTHSHINE) / (1 - EARTHSHINE)).clamp(0, 1)
    axis = torch.arange(SIZE) + 0.5
    x = (disc.sum(1) * axis).sum(1) / area
    y = (disc.sum(2) * axis).sum(1) / area
    lit_x = (glow.sum(1) * axis).sum(1) / glow.sum((1, 2))
    return Moons(
        lit=glow.sum((1, 2)) / area,
        side=torch.where(lit_x >= x, 1.0, -1.0),
        x=x,
        y=y,
        radius=(area / torch.pi).sqrt(),
    )


def misfit(images: Tensor) -> Tensor:
    """Root mean square distance of each image to the moon drawn from its own measured parameters: [N]."""
    found = measure(images)
    clean = Moons(*(value.nan_to_num() for value in vars(found).values()))
    return (images.float() - render(clean)).square().mean((1, 2, 3)).sqrt()
