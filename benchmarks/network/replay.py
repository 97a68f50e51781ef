"""What one network call costs by its batch size: what wide windows of a speculative walk have to pay.

    python -m benchmarks.network.replay                  a minute or two; a GPU if there is one, else a CPU
    python -m benchmarks.network.replay --device cpu

The embedded networks and the CIFAR-10 U-Net, hoisted, on a GPU in a CUDA graph; on a CPU the U-Net is left out.
A call's time says nothing of its weights: the U-Net's are random. Writes benchmarks/results/<gpu or cpu>__replay.json.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.results import FOLDER, machine_name, write_result
from benchmarks.speculation.run import labels
from benchmarks.walks.networks import KINDS
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.timer import seconds
from ddpm_fast.models.checkpoint import Classes, load_checkpoint

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def networks(device: torch.device) -> dict[str, tuple[nn.Module, Classes | None, tuple[int, ...], torch.dtype]]:
    """Networks by name, with their classes, the shape of a sample and a dtype to run in."""
    found: dict[str, tuple[nn.Module, Classes | None, tuple[int, ...], torch.dtype]] = {}
    for name in ("moons", "digits"):
        checkpoint = load_checkpoint(name, device=device)
        found[f"embedded {name}"] = (checkpoint.model, checkpoint.classes, checkpoint.shape, torch.float32)
    if device.type == "cuda":
        kind = KINDS["cifar"]
        try:
            model = kind.make().eval().requires_grad_(False).to(device)
        except ImportError as error:
            print(f"{kind.short} left out: {error}")
            return found
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{kind.short}, {str(dtype).removeprefix('torch.')}"
            found[name] = (copy.deepcopy(model).to(dtype), None, kind.shape, dtype)
    return found


@torch.no_grad()
def measure(device: torch.device, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds of a call for every network and batch size, and how many single calls that is."""
    rows = []
    for name, (model, classes, shape, dtype) in networks(device).items():
        alone = None
        for batch in batches:
            kwargs = labels(classes, batch, device)
            network = Network(Call.of(model, (batch, *shape), model_kwargs=kwargs, device=device, dtype=dtype))
            network.prepare([0], Execution(optimize="hoist"))
            took = seconds(network, device)
            alone = took if alone is None else alone
            rows.append({"network": name, "batch": batch, "ms": 1e3 * took, "single_calls": took / alone})
            print(f"{name:26} batch {batch:3} {1e3 * took:9.3f} ms = {took / alone:6.2f} single calls", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="two batch sizes; writes nothing")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the result")
    parser.add_argument("--commit", help="where there is no git: what `git describe --always --dirty` says elsewhere")
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = measure(device, BATCHES[:2] if given.smoke else BATCHES)
    if not given.smoke:
        print(write_result(f"{machine_name(device)}__replay", rows, folder=given.out, commit=given.commit))


if __name__ == "__main__":
    main()
