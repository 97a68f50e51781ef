"""A convolution with all that stands around it in a U-Net: normalisation before it, sums and the next statistics after.

A layer computes, for every sample b, output pixel p and output channel n,

    out[b, n, p] = scale · (Σ_taps Σ_c weight[tap, c, n] · f(x[b, c, p(tap)]) + Σ_c shortcut weight[c, n] · s[b, c, p]
                            + bias[n] + vector[b, n] + residual[b, n, p])

where x are the sources side by side (a concat that is never written), f(x) = silu(a[b, c] · x + d[b, c]) is a group
norm as an affine map per sample and channel (Wu & He 2018), and p(tap) is the pixel under a tap: of the image, of the
image enlarged twice to nearest neighbours, or nothing outside. Products are of the sources' dtype, sums of float32.

The statistics of a channel are the mean and the sum of squared deviations of what was stored (Chan, Golub & LeVeque
1983): parts of an image merge without the cancellation of sums of squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_fast.kernels.checks import check_contiguous, check_tensor
from ddpm_fast.kernels.dispatch import choose_backend
from ddpm_fast.kernels.tiles import Tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Affine:
    """A normalisation as an affine map: a, d, float32 [B, C], for f(x) = a · x + d."""

    a: Tensor
    d: Tensor


@dataclass(frozen=True)
class GroupNorm:
    """A group norm of one or two tensors side by side, over channels C.

    Attributes:
        groups: Number of groups; divides C.
        eps: Added to the variance.
        gamma, beta: Weight and bias, [C]; None for 1 and 0.
        gain, shift: Modulation per sample, [B or 1, C]: the result is norm(x) · gain + shift. None for 1 and 0.
    """

    groups: int
    eps: float
    gamma: Tensor | None = None
    beta: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Window:
    """The pixels that a tap of a layer reads.

    Attributes:
        size: Kernel size, 1 or 3.
        stride: 1 or 2.
        top, left, bottom, right: Zeros around the image, after it was enlarged.
        upsample: Whether the image is enlarged twice, to nearest neighbours, before.
    """

    size: int = 1
    stride: int = 1
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    upsample: bool = False

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output for an image of this size."""
        factor = 2 if self.upsample else 1
        rows = factor * height + self.top + self.bottom - self.size
        columns = factor * width + self.left + self.right - self.size
        return rows // self.stride + 1, columns // self.stride + 1


def pack_weight(weight: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return the weights of a layer as the rows of a product, contiguous [taps · C + C_s, N].

    Args:
        weight: [N, C, k, k] or [N, C].
        shortcut: Weight of a 1×1 product that is added, [N, C_s, 1, 1] or [N, C_s].
    """
    rows = weight.reshape(*weight.shape[:2], -1).permute(2, 1, 0).reshape(-1, len(weight))
    if shortcut is not None:
        rows = torch.cat([rows, shortcut.flatten(1).t()])
    return rows.contiguous()


def conv_fused(
    sources: Sequence[Tensor],
    weight: Tensor,
    window: Window,
    *,
    affine: Affine | None = None,
    silu: bool = False,
    shortcut: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    vector: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    stats: bool = False,
    then: GroupNorm | None = None,
    beside: Sequence[Tensor] = (),
    tf32: bool = False,
    tiles: Tiles | None = None,
    tickets: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Affine | None]:
    """Compute a layer; see the head of this module.

    Args:
        sources: One or two tensors [B, C_i, H, W] of one dtype, channels_last.
        weight: What `pack_weight` returns, in the sources' dtype; C = Σ C_i, C_s = Σ of the shortcut's channels.
        window: The pixels that the taps read.
        affine, silu: The map f: the affine map over C channels, then SiLU if asked for. Zeros around the image stay 0.
        shortcut: None to two tensors [B, C_j, H_out, W_out] of the sources' dtype, channels_last.
        bias: float32 [N].
        vector: [B or 1, N], any floating point dtype, contiguous in N.
        residual: [B, N, H_out, W_out] of the sources' dtype, channels_last.
        scale: A factor for the whole.
        stats: Whether to return the statistics of the output.
        then: The norm that reads the output next: its affine map is returned. It implies `stats`.
        beside: Statistics of the tensor that stands behind the output in the concat that `then` normalises, if any.
        tf32: Whether products of float32 may be rounded to TF32.
        tiles: The division among programs; None takes `tiles_for`. The sums are rounded accordingly.
        tickets: Memory for tickets, int32 zeros, which are zeros again afterwards. Launches that may run at the same
            time need their own. Too little memory, or None, is made up for.
        backend: "triton" or "torch"; None chooses.

    Returns:
        The output [B, N, H_out, W_out], channels_last; its statistics float32 [B, N, 2], or None; the affine map of
        `then`, or None.

    Raises:
        ValueError: Shapes, dtypes or memory formats do not fit.
    """
    _check(sources, weight, window, affine, shortcut, bias, vector, residual, then, beside)
    if choose_backend(sources[0].device, backend) == "triton":
        from ddpm_fast.kernels import conv_fused_triton

        return conv_fused_triton.launch(
            sources, weight, window, affine, silu, shortcut, bias, vector, residual, scale, stats, then, beside, tf32,
            tiles, tickets,
        )  # fmt: skip
    dtype, channels = sources[0].dtype, sum(source.shape[1] for source in sources)
    taps = window.size**2
    x = torch.cat(list(sources), dim=1).float()
    if affine is not None:
        x = x * affine.a[:, :, None, None] + affine.d[:, :, None, None]
    if silu:
        x = F.silu(x)
    x = x.to(dtype).float()
    if window.upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = F.pad(x, (window.left, window.right, window.top, window.bottom))
    rows = weight.float()
    kernel = rows[: taps * channels].view(window.size, window.size, channels, -1).permute(3, 2, 0, 1)
    result = F.conv2d(x, kernel, stride=window.stride)
    if shortcut:
        raw = torch.cat(list(shortcut), dim=1).float()
        result = result + F.conv2d(raw, rows[taps * channels :].t()[:, :, None, None])
    if bias is not None:
        result = result + bias[:, None, None]
    if vector is not None:
        result = result + vector.float()[:, :, None, None]
    if residual is not None:
        result = result + residual.float()
    out = (result * scale).to(dtype).contiguous(memory_format=torch.channels_last)
    if not stats and then is None:
        return out, None, None
    found = channel_stats(out, backend="torch")
    following = None
    if then is not None:
        following = norm_affine([found, *beside], out.shape[2] * out.shape[3], then, backend="torch")
    return out, found, following


def channel_stats(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Return mean and sum of squared deviations of every sample's channels, float32 [B, C, 2].

    Args:
        x: [B, C, H, W], channels_last.
        backend: "triton" or "torch"; None chooses.
    """
    if choose_backend(x.device, backend) == "triton":
        from ddpm_fast.kernels import conv_fused_triton

        return conv_fused_triton.launch_stats(x)
    values = x.float().flatten(2)
    mean = values.mean(2)
    return torch.stack([mean, (values - mean[:, :, None]).square().sum(2)], dim=2)


def norm_affine(stats: Sequence[Tensor], pixels: int, norm: GroupNorm, *, backend: str | None = None) -> Affine:
    """Return a group norm as an affine map.

    Args:
        stats: Statistics of one or two tensors side by side, float32 [B, C_i, 2] (`channel_stats`).
        pixels: H · W, which the statistics are of.
        norm: The norm, over C = Σ C_i channels.
        backend: "triton" or "torch"; None chooses.
    """
    _check_norm(norm, len(stats[0]), sum(each.shape[1] for each in stats))
    if choose_backend(stats[0].device, backend) == "triton":
        from ddpm_fast.kernels import conv_fused_triton

        return conv_fused_triton.launch_affine(stats, pixels, norm)
    both = torch.cat(list(stats), dim=1)
    batch, channels, _ = both.shape
    mean, squares = both.view(batch, norm.groups, -1, 2).unbind(3)
    center = mean.mean(2, keepdim=True)
    variance = (squares + pixels * (mean - center).square()).mean(2, keepdim=True) / pixels
    a = (variance + norm.eps).rsqrt().expand_as(mean).reshape(batch, channels).contiguous()
    if norm.gamma is not None:
        a = a * norm.gamma.float()
    d = -center.expand_as(mean).reshape(batch, channels) * a
    if norm.beta is not None:
        d = d + norm.beta.float()
    if norm.gain is not None:
        a, d = a * norm.gain.float(), d * norm.gain.float()
    if norm.shift is not None:
        d = d + norm.shift.float()
    return Affine(a, d)


def _check(
    sources: Sequence[Tensor],
    weight: Tensor,
    window: Window,
    affine: Affine | None,
    shortcut: Sequence[Tensor],
    bias: Tensor | None,
    vector: Tensor | None,
    residual: Tensor | None,
    then: GroupNorm | None,
    beside: Sequence[Tensor],
) -> None:
    """Raise ValueError unless everything fits."""
    if len(sources) not in (1, 2) or len(shortcut) > 2 or len(beside) > 1:
        raise ValueError("a layer reads one or two sources, at most two in its shortcut, and at most one beside it")
    if window.size not in (1, 3) or window.stride not in (1, 2):
        raise ValueError(f"kernels are 1 or 3 wide with stride 1 or 2, got {window.size} and {window.stride}")
    first = sources[0]
    batch, _, height, width = first.shape
    dtype, device = first.dtype, first.device
    out_size = window.output_size(height, width)
    if min(out_size) < 1:
        raise ValueError(f"the image of {height} x {width} pixels is smaller than the kernel")
    images = [(f"sources[{i}]", source, (height, width)) for i, source in enumerate(sources)]
    images += [(f"shortcut[{i}]", source, out_size) for i, source in enumerate(shortcut)]
    rows = window.size**2 * sum(source.shape[1] for source in sources) + sum(each.shape[1] for each in shortcut)
    outputs = weight.shape[-1]
    if residual is not None:
        images.append(("residual", residual, out_size))
        if residual.shape[1] != outputs:
            raise ValueError(f"residual must have {outputs} channels, got {residual.shape[1]}")
    for name, tensor, size in images:
        check_tensor(name, tensor, (batch, tensor.shape[1], *size), (dtype,), device)
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} must be channels_last, got strides {tensor.stride()}")
    check_tensor("weight", weight, (rows, outputs), (dtype,), device)
    if dtype not in DTYPES or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous and one of {[str(each) for each in DTYPES]}, got {dtype}")
    channels = sum(source.shape[1] for source in sources)
    if affine is not None:
        for name, tensor in (("affine.a", affine.a), ("affine.d", affine.d)):
            check_tensor(name, tensor, (batch, channels), (torch.float32,), device)
            check_contiguous(name, tensor)
    if bias is not None:
        check_tensor("bias", bias, (outputs,), (torch.float32,), device)
        check_contiguous("bias", bias)
    if vector is not None and (vector.dim() != 2 or vector.shape[0] not in (1, batch) or vector.shape[1] != outputs):
        raise ValueError(f"vector must have shape {(batch, outputs)} or {(1, outputs)}, got {tuple(vector.shape)}")
    if vector is not None and vector.stride(1) != 1 and outputs > 1:
        raise ValueError(f"vector must have its channels side by side, got strides {vector.stride()}")
    if then is not None:
        normed = outputs + sum(each.shape[1] for each in beside)
        _check_norm(then, batch, normed)


def _check_norm(norm: GroupNorm, batch: int, channels: int) -> None:
    """Raise ValueError unless a norm fits that many channels."""
    if channels % norm.groups:
        raise ValueError(f"{norm.groups} groups do not divide {channels} channels")
    for name, tensor in (("gamma", norm.gamma), ("beta", norm.beta)):
        if tensor is not None and (tuple(tensor.shape) != (channels,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous with shape {(channels,)}, got {tuple(tensor.shape)}")
    for name, tensor in (("gain", norm.gain), ("shift", norm.shift)):
        fits = tensor is None or (tensor.dim() == 2 and tensor.shape[0] in (1, batch) and tensor.shape[1] == channels)
        if tensor is not None and not (fits and (tensor.stride(1) == 1 or channels == 1)):
            raise ValueError(f"{name} must have rows {(batch, channels)} or {(1, channels)}, got {tuple(tensor.shape)}")
