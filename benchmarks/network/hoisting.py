"""Count the operations that hoisting removes from the loop of common networks, and measure the time that this saves.

    python -m benchmarks.network.hoisting [--guided-diffusion CHECKOUT]

The networks have random weights and run on a CPU. The network as it is and the hoisted network take turns call by call;
the tables are those of 1000 steps. The command prints a table and writes benchmarks/results/cpu__hoisting.json, from
which `python -m benchmarks.tables` fills docs/network.md.
"""

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from benchmarks.common.standins import stand_in_for_torchvision
from benchmarks.walks.networks import CIFAR
from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.models.checkpoint import load_checkpoint

STEPS = range(999, -1, -1)
SMALL = {"sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def networks(guided: str | None) -> Iterator[tuple[str, nn.Module, tuple[int, ...], dict[str, Any]]]:
    """Yield the name, the network, the shape of the batch and the keywords of each case.

    Args:
        guided: A checkout of guided-diffusion, whose network is left out without one.
    """
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    label = {"class_labels": torch.tensor([7])}
    embedded = load_checkpoint().model
    assert isinstance(embedded, nn.Module)
    yield "the embedded U-Net", embedded, (1, 1, 32, 32), {}
    yield "diffusers UNet2DModel, google/ddpm-cifar10-32's", UNet2DModel(**CIFAR), (1, 3, 32, 32), {}
    classes = UNet2DModel(num_class_embeds=10, **SMALL, **PLAIN)
    yield "diffusers UNet2DModel, small, ten classes", classes, (1, 3, 32, 32), label
    conditional = UNet2DConditionModel(cross_attention_dim=32, attention_head_dim=8, **SMALL, **CROSS)
    prompt = {"encoder_hidden_states": torch.randn(1, 16, 32)}
    yield "diffusers UNet2DConditionModel, small", conditional, (1, 4, 32, 32), prompt
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=6, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    yield "diffusers DiTTransformer2DModel, 6 layers", transformer, (1, 4, 16, 16), label
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch import Unet

    yield "lucidrains Unet, dim 32", Unet(dim=32, dim_mults=(1, 2, 4), flash_attn=False), (1, 3, 32, 32), {}
    if guided:
        sys.path.insert(0, guided)
        from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

        flags = {
            **model_and_diffusion_defaults(), "image_size": 64, "num_channels": 32, "num_res_blocks": 1,
            "learn_sigma": True, "class_cond": True, "resblock_updown": True,
        }  # fmt: skip
        network, _ = create_model_and_diffusion(**flags)
        yield "guided-diffusion UNetModel, 32 channels", network, (1, 3, 64, 64), {"y": torch.tensor([7])}


def measure(name: str, network: nn.Module, shape: tuple[int, ...], kwargs: dict[str, Any], seconds: float) -> Row:
    """Return the counts of operations and the median times of a call."""
    network.eval().requires_grad_(False)
    x, t = torch.randn(shape), torch.full(shape[:1], 500)
    began = time.perf_counter()
    hoisted = Hoisted(network, x, STEPS, kwargs)
    build = time.perf_counter() - began
    row = STEPS.index(500)
    calls: list[Callable[[], Any]] = [lambda: network(x, t, **kwargs), lambda: hoisted(x, t, row)]
    times: list[list[float]] = [[], []]
    outputs: list[Any] = [None, None]
    with torch.no_grad():
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times[0]) < 10:
            for which, call in enumerate(calls):
                began = time.perf_counter()
                outputs[which] = call()
                times[which].append(time.perf_counter() - began)
    expected = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0].sample
    ratios = sorted(before / after for before, after in zip(*times, strict=True))
    return {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch": shape[0],
        **asdict(hoisted.counts),
        "plain_ms": 1e3 * statistics.median(times[0]),
        "hoisted_ms": 1e3 * statistics.median(times[1]),
        "calls": len(ratios),
        "speedup": statistics.median(ratios),
        "speedup_p20": ratios[len(ratios) // 5],
        "speedup_p80": ratios[len(ratios) * 4 // 5],
        "build_s": build,
        "largest_difference": (outputs[1] - expected).abs().max().item(),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--guided-diffusion", metavar="CHECKOUT", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--seconds", type=float, default=8, help="seconds for each network (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for case in networks(arguments.guided_diffusion):
        with contextlib.redirect_stderr(io.StringIO()):  # hides the warnings of torch.export
            rows.append(measure(*case, seconds=arguments.seconds))
        print(
            "{network:48} {before:4} -> {after:4} operations, {tables:2} tables of {table_bytes:,} bytes; "
            "{plain_ms:6.1f} -> {hoisted_ms:6.1f} ms: {speedup:.2f} x ({speedup_p20:.2f} to {speedup_p80:.2f}), "
            "built in {build_s:.1f} s, difference {largest_difference:.0e}".format(**rows[-1])
        )
    versions = {name: version(name) for name in ("diffusers", "denoising-diffusion-pytorch")}
    print(write_result("cpu__hoisting", rows, versions=versions))
    slower = [row["network"] for row in rows if row["speedup"] < 1]
    if slower:
        sys.exit(f"slower: {', '.join(slower)}")


if __name__ == "__main__":
    main()
