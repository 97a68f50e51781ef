"""Count what fusion leaves of common networks, predict the time of a call, and measure every layer on a GPU.

    python -m benchmarks.network.layers [--guided-diffusion CHECKOUT]    counts and predictions: no GPU is needed
    python -m benchmarks.network.layers --measure                        on a GPU: each layer of the CIFAR-10 U-Net

Measured are our layer, cuDNN's convolution alone, and the chain of operations as PyTorch runs it.

The predictions are those of a model of time for an H100 (kernels/tiles.py), written down before anyone has measured.
Counts and predictions go to benchmarks/results/cpu__fusion.json, measurements to <gpu>__layers.json.
"""

import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import FOLDER, Row, machine_name, write_result
from benchmarks.network.hoisting import networks
from benchmarks.walks.networks import CIFAR
from ddpm_fast.engine.fuse import Fusion, Shape
from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.engine.timer import seconds
from ddpm_fast.kernels.conv_fused import Affine, GroupNorm, Window, conv_fused, pack_weight
from ddpm_fast.kernels.tiles import predicted_us, tiles_for

OTHER_US = 3.5  # of a kernel that is not fused, in a graph at batch size 1
ATTENTION_US = 9.2  # as an H100 measured torch's attention in this network
BATCHES = (1, 16, 256)
SMOKE = (
    Shape(1, 4, 4, (8, 4), 16, Window(3, 1, 1, 1, 1, 1), (8, 4), True, True, True, True, True),
    Shape(1, 4, 4, (8,), 3, Window(1), (), False, False, False, False, False),
)


def fused(network: torch.nn.Module, shape: tuple[int, ...], kwargs: dict[str, Any]) -> Fusion:
    """Return what fusion makes of a network."""
    with contextlib.redirect_stderr(io.StringIO()):  # hides the warnings of torch.export
        return Hoisted(network.eval().requires_grad_(False), torch.randn(shape), [999, 0], kwargs).fuse(
            torch.randn(shape)
        )


def layer_us(shape: Shape) -> float:
    """Return the microseconds that the model of time predicts for a layer."""
    sizes = (shape.batch, shape.pixels, shape.channels, shape.outputs, shape.window.size, shape.shortcut)
    mapped = shape.normed or shape.silu
    return predicted_us(tiles_for(*sizes, mapped=mapped), *sizes, mapped=mapped)


def predict(name: str, fusion: Fusion) -> Row:
    """Return the counts of a network, and the predicted time of a call."""
    attention = sum(count for name, count in fusion.left.items() if "attention" in name)
    others = sum(fusion.left.values()) - attention
    return {
        "network": name,
        "before": fusion.before,
        "after": fusion.after,
        "layers": fusion.layers,
        "left": dict(fusion.left),
        "reasons": sorted(set(fusion.reasons.values())),
        "layers_us": round(sum(map(layer_us, fusion.shapes))),
        "call_us": round(sum(map(layer_us, fusion.shapes)) + ATTENTION_US * attention + OTHER_US * others),
    }


def measure(shape: Shape, count: int, device: torch.device) -> Row:
    """Return the times of a layer in a CUDA graph: ours, cuDNN's convolution alone, and the eager chain."""
    numbers: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}

    def image(channels: int, size: tuple[int, int]) -> torch.Tensor:
        made = torch.randn(shape.batch, channels, *size, **numbers)
        return made.contiguous(memory_format=torch.channels_last)

    window, channels = shape.window, sum(shape.channels)
    size, out_size = (shape.height, shape.width), window.output_size(shape.height, shape.width)
    weight = torch.randn(shape.outputs, channels, window.size, window.size, **numbers)
    weight = (weight / (channels * window.size**2) ** 0.5).contiguous(memory_format=torch.channels_last)
    sources = [image(each, size) for each in shape.channels]
    shortcut = [image(each, out_size) for each in shape.shortcut]
    own = torch.randn(shape.outputs, max(1, sum(shape.shortcut)), **numbers)
    affine = Affine(*(torch.rand(shape.batch, channels, device=device) for _ in range(2))) if shape.normed else None
    bias, residual = (
        torch.randn(shape.outputs, device=device),
        image(shape.outputs, out_size) if shape.residual else None,
    )
    vector = torch.randn(shape.batch, shape.outputs, **numbers) if shape.vector else None
    groups = 32 if shape.outputs % 32 == 0 else 1
    then = GroupNorm(groups, 1e-6) if shape.statistics else None
    tickets = torch.zeros(4096 + shape.batch, dtype=torch.int32, device=device)
    packed = pack_weight(weight, own if shortcut else None)

    def ours() -> Any:
        return conv_fused(
            sources, packed, window, affine=affine, silu=shape.silu, shortcut=shortcut, bias=bias, vector=vector,
            residual=residual, then=then, tickets=tickets,
        )  # fmt: skip

    joined = torch.cat(sources, 1)
    read = F.interpolate(joined, scale_factor=2.0) if window.upsample else joined
    read = F.pad(read, (window.left, window.right, window.top, window.bottom))
    read = read.contiguous(memory_format=torch.channels_last)
    gamma, half = torch.ones(channels, **numbers), bias.bfloat16()

    def cudnn() -> Any:
        return F.conv2d(read, weight, half, stride=window.stride)

    def chain() -> Any:
        x = torch.cat(sources, 1) if len(sources) == 2 else sources[0]
        x = F.group_norm(x, 32 if channels % 32 == 0 else 1, gamma, gamma, 1e-6) if shape.normed else x
        x = F.silu(x) if shape.silu else x
        x = F.interpolate(x, scale_factor=2.0) if window.upsample else x
        x = F.pad(x, (window.left, window.right, window.top, window.bottom))
        x = F.conv2d(x, weight, half, stride=window.stride)
        x = x + vector[:, :, None, None] if vector is not None else x
        if shortcut:
            x = x + F.conv2d(torch.cat(shortcut, 1) if len(shortcut) == 2 else shortcut[0], own[:, :, None, None])
        return x + residual if residual is not None else x

    times: dict[str, float] = {}
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {"ours_us": ours, "cudnn_us": cudnn, "chain_us": chain}
        for name, call in calls.items():
            times[name] = 1e6 * seconds(call, device)
    return {
        "layer": f"{'+'.join(map(str, shape.channels))} -> {shape.outputs}, {shape.height} x {shape.width}, "
        f"{window.size} x {window.size}{', enlarged' if window.upsample else ''}"
        f"{f', stride {window.stride}' if window.stride > 1 else ''}"
        f"{', shortcut' if shape.shortcut else ''}{', residual' if shape.residual else ''}",
        "batch": shape.batch,
        "count": count,
        **times,
        "predicted_us": layer_us(shape),
        "TFLOP_per_s": 2e-6 * shape.multiply_adds / times["ours_us"],
    }


def cifar(batch: int) -> Fusion:
    """Return what fusion makes of google/ddpm-cifar10-32's network, with random weights."""
    from diffusers import UNet2DModel

    return fused(UNet2DModel(**CIFAR), (batch, 3, 32, 32), {})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--guided-diffusion", metavar="CHECKOUT", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--measure", action="store_true", help="measure the layers on a GPU")
    parser.add_argument("--device", default="cuda", help="of the measurements (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="measure two small layers")
    parser.add_argument("--budget", type=float, default=60, help="seconds for measurements (default: %(default)s)")
    add_result_options(parser, folder=None)
    given = parser.parse_args()
    rows: list[Row] = []
    torch.manual_seed(0)
    if given.measure:
        device, until = torch.device(given.device), time.monotonic() + given.budget
        for batch in BATCHES[: 1 if given.smoke else None]:
            shapes = SMOKE if given.smoke else cifar(batch).shapes
            for shape, count in Counter(shapes).items():
                if time.monotonic() > until:
                    return
                rows.append(measure(shape, count, device))
                print(
                    "batch {batch:3} {layer:60} x {count:2}: {ours_us:7.1f} us, predicted {predicted_us:7.1f}; "
                    "cuDNN alone {cudnn_us:7.1f}, chain {chain_us:7.1f}".format(**rows[-1]),
                    flush=True,
                )
                write_result(f"{machine_name(device)}__layers", rows, folder=given.out or FOLDER, commit=given.commit)
        return
    for name, network, sizes, kwargs in networks(given.guided_diffusion):
        rows.append(predict(name, fused(network, sizes, kwargs)))
        print(
            "{network:50} {before:4} -> {after:3}: {layers} layers, {left}; predicted {call_us} us".format(**rows[-1])
        )
    print(write_result("cpu__fusion", rows, folder=given.out or FOLDER, commit=given.commit))


if __name__ == "__main__":
    main()
