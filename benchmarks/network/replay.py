"""Measure the time of one network call by its batch size, which is the cost of wide windows in speculative sampling.

    python -m benchmarks.network.replay                  takes a minute or two, on a GPU if there is one
    python -m benchmarks.network.replay --device cpu     measures a CPU

The networks are the embedded networks and the CIFAR-10 U-Net, all hoisted. On a GPU the calls run in a CUDA graph. On
a CPU the U-Net is left out. Its weights are random, since the time of a call does not depend on them. The result is
written to benchmarks/results/<gpu or cpu>__replay.json.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import FOLDER, Row, machine_name, write_result
from benchmarks.speculation.run import labels
from benchmarks.walks.networks import KINDS
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.timer import seconds
from ddpm_fast.models.checkpoint import Classes, load_checkpoint

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def networks(device: torch.device) -> dict[str, tuple[Model, Classes | None, tuple[int, ...], torch.dtype]]:
    """Return the networks by name, each with its classes, the shape of a sample and the dtype to run in."""
    found: dict[str, tuple[Model, Classes | None, tuple[int, ...], torch.dtype]] = {}
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
def measure(device: torch.device, batches: tuple[int, ...], save: Callable[[list[Row]], Any]) -> list[Row]:
    """Return the milliseconds of a call for every network and batch size, and the same in calls with one sample.

    `save` gets the rows so far, so that a run that is cut off loses one row.
    """
    rows: list[Row] = []
    for name, (model, classes, shape, dtype) in networks(device).items():
        single = None
        for batch in batches:
            kwargs = labels(classes, batch, device)
            network = Network(Call.of(model, (batch, *shape), model_kwargs=kwargs, device=device, dtype=dtype))
            network.prepare([0], Execution(optimize="hoist"))
            duration = seconds(network, device)
            single = duration if single is None else single
            rows.append({"network": name, "batch": batch, "ms": 1e3 * duration, "single_calls": duration / single})
            save(rows)
            print("{network:26} batch {batch:3} {ms:9.3f} ms = {single_calls:6.2f} single calls".format(**rows[-1]))
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="two batch sizes; writes nothing without --out")
    add_result_options(parser, folder=None)
    given = parser.parse_args()
    device = torch.device(given.device)

    def save(rows: list[Row]) -> None:
        if given.out or not given.smoke:
            write_result(f"{machine_name(device)}__replay", rows, folder=given.out or FOLDER, commit=given.commit)

    measure(device, BATCHES[:2] if given.smoke else BATCHES, save)


if __name__ == "__main__":
    main()
