"""Moon phases: an endless procedural data set of small grey images, and a fit that measures such images.

A moon is a disc of radius R (pixels) at (x, y), lit from the left or from the right. On the line at
height v above the centre the disc spans |u| <= h with h = sqrt(R^2 - v^2). The sunlit part of a
moon lit from the right is u > (1 - 2 f) h: the terminator is half an ellipse, and the lit share of
the area is exactly f. Sky is -1 and the lit part +1. The unlit part of the disc has the value
`EARTHSHINE`, so that the radius can be measured in every phase.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.seeding import keyed_generator

DATA_STREAM = 1
SIZE = 32
EARTHSHINE = -0.6
RADIUS_RANGE = (5.0, 11.0)
MARGIN = 1.0  # pixels of sky around every disc
SUB_ROWS = 8  # lines a pixel; along a line the coverage is exact


@dataclass(frozen=True)
class Moons:
    """The parameters of N moons, each a float32 tensor of shape [N].

    Attributes:
        lit: Lit fraction of the disc's area, in [0, 1].
        side: +1 where the right limb is lit, -1 where the left limb is lit.
        x, y: Centre in pixels from the image's upper left corner.
        radius: Radius in pixels.
    """

    lit: Tensor
    side: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor


def draw_parameters(count: int, generator: torch.Generator | None = None) -> Moons:
    """Draw `count` moons: lit ~ U[0, 1], side fair, radius ~ U(RADIUS_RANGE), centre uniform inside the sky."""
    u = torch.rand(5, count, generator=generator, dtype=torch.float32, device="cpu")
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
    line = (torch.arange(SIZE * SUB_ROWS, dtype=torch.float32, device="cpu") + 0.5) / SUB_ROWS
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
    """Return the covered share of every pixel, given intervals [start, end] of its lines.

    The shapes are [N, lines] -> [N, SIZE, SIZE].
    """
    left = torch.arange(SIZE, dtype=start.dtype, device="cpu")
    overlap = torch.minimum(end[..., None], left + 1) - torch.maximum(start[..., None], left)
    return overlap.clamp(0, 1).view(len(start), SIZE, SUB_ROWS, SIZE).mean(2)


def batch(count: int, seed: int, index: int = 0) -> Tensor:
    """Return the images of batch `index` of the endless set `seed`: float32 [count, 1, 32, 32] in [-1, 1].

    A batch depends on (count, seed, index) alone, so a resumed training gets the same batches.
    """
    return render(draw_parameters(count, keyed_generator(DATA_STREAM, seed, index)))


FIT_STEPS = 12
# Step sizes of the finite differences in x, y, radius, lit.
PROBES = torch.diag(torch.tensor([0.05, 0.05, 0.05, 0.01], dtype=torch.float32, device="cpu"))
LOWEST = torch.tensor([0.0, 0.0, RADIUS_RANGE[0] / 2, 0.0], dtype=torch.float32, device="cpu")
HIGHEST = torch.tensor([SIZE, SIZE, SIZE / 2, 1.0], dtype=torch.float32, device="cpu")


def measure(images: Tensor) -> tuple[Moons, Tensor]:
    """Find the moon that is nearest to each image [N, 1, SIZE, SIZE].

    The image may show anything. The fit minimises the squared error over (x, y, radius, lit), once for either side. On
    99 % of the data itself the fit finds centre and radius to 0.01 pixels and the lit fraction to 0.001
    (tests/data/test_moons.py). The radius is at least the one in `LOWEST`, so that an empty sky does not pass for a
    tiny moon.

    Returns:
        The moons, and the remaining root mean square pixel difference [N], the distance of the image from any moon.
    """
    images = images.float().clamp(-1, 1)
    side = torch.ones(len(images), dtype=torch.float32, device="cpu")
    right, right_error = _fit(images, side)
    left, left_error = _fit(images, -side)
    is_right = right_error <= left_error
    values = torch.where(is_right, right, left)
    return _moons(values, torch.where(is_right, side, -side)), torch.minimum(right_error, left_error)


def _fit(images: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Run Levenberg-Marquardt from the moments of the disc; return values [4, N] and the remaining distance [N]."""
    values = _moments(images)
    error = _distance(images, values, side)
    damping = torch.full_like(error, 1e-3)
    for _ in range(FIT_STEPS):
        picture = render(_moons(values, side))
        probes = [(render(_moons(values + probe[:, None], side)) - picture) / probe.sum() for probe in PROBES]
        slopes = torch.stack(probes).flatten(2)  # [4, N, pixels]
        normal = torch.einsum("inp,jnp->nij", slopes, slopes)
        normal = normal + (damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-6).diag_embed()
        gradient = torch.einsum("inp,np->ni", slopes, (images - picture).flatten(1))
        moved = values + torch.linalg.solve(normal, gradient).T
        moved = torch.minimum(torch.maximum(moved, LOWEST[:, None]), HIGHEST[:, None])
        moved_error = _distance(images, moved, side)
        better = moved_error < error
        values = torch.where(better, moved, values)
        error = torch.where(better, moved_error, error)
        damping = torch.where(better, damping / 5, damping * 10)
    return values, error


def _moons(values: Tensor, side: Tensor) -> Moons:
    """Return the moons of the values [4, N]."""
    x, y, radius, lit = values
    return Moons(lit=lit, side=side, x=x, y=y, radius=radius)


def _distance(images: Tensor, values: Tensor, side: Tensor) -> Tensor:
    """Return the root mean square pixel difference between images and moons: [N]."""
    return (images - render(_moons(values, side))).square().mean((1, 2, 3)).sqrt()


def _moments(images: Tensor) -> Tensor:
    """Return a first guess [4, N]: the disc is all that is brighter than halfway between sky and earthshine."""
    disc = (images[:, 0] > (EARTHSHINE - 1) / 2).float()
    glow = ((images[:, 0] - EARTHSHINE) / (1 - EARTHSHINE)).clamp(0, 1)
    area = disc.sum((1, 2)).clamp(min=1)
    axis = torch.arange(SIZE, dtype=torch.float32, device="cpu") + 0.5
    x = (disc.sum(1) * axis).sum(1) / area
    y = (disc.sum(2) * axis).sum(1) / area
    return torch.stack([x, y, (area / torch.pi).sqrt(), (glow.sum((1, 2)) / area).clamp(0.02, 0.98)])
