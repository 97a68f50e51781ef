"""Measure how long a hoisted network takes to build for several batch sizes, with one trace and with a trace for each.

    python -m benchmarks.network.building      takes a minute; needs diffusers

The batch sizes are those of a speculative run with windows of 2 to 32 steps. The result is written to
benchmarks/results/cpu__building.json.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import Row, write_result
from benchmarks.walks.networks import KINDS
from ddpm_fast.engine import trace
from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.models.checkpoint import load_checkpoint

BATCHES = (1, 2, 4, 8, 16, 32)
TIMES = list(range(0, 1000, 10))


def networks() -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    """Return the makers of the networks by name, with the shape of a sample."""
    kind = KINDS["moons"]
    return {
        "embedded moons": (lambda: load_checkpoint().model, (1, 32, 32)),
        kind.short: (lambda: kind.make().eval(), kind.shape),
    }


def build(network: nn.Module, shape: tuple[int, ...], shared: bool) -> tuple[float, int]:
    """Return the seconds for all batch sizes, and the number of exports."""
    exports, export = 0, torch.export.export

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal exports
        exports += 1
        return export(*args, **kwargs)  # type: ignore[arg-type]

    began = time.perf_counter()
    primes = trace._PRIMES if shared else ()  # without a prime batch size every one is traced by itself
    with mock.patch.object(torch.export, "export", counted), mock.patch.object(trace, "_PRIMES", primes):
        for batch in BATCHES:
            Hoisted(network, torch.zeros(batch, *shape), TIMES)
    return time.perf_counter() - began, exports


def measure() -> list[Row]:
    """Return a row for each network; both ways in turns, each with a network of its own."""
    rows = []
    for name, (make, shape) in networks().items():
        build(make(), shape, True)  # imports, and torch's own caches
        times: dict[bool, list[float]] = {True: [], False: []}
        exports = {}
        for _ in range(3):
            for shared in (True, False):
                seconds, exports[shared] = build(make(), shape, shared)
                times[shared].append(seconds)
        best = {shared: min(found) for shared, found in times.items()}
        rows.append(
            {
                "network": name,
                "batch_sizes": list(BATCHES),
                "exports_shared": exports[True],
                "exports_each": exports[False],
                "seconds_shared": best[True],
                "seconds_each": best[False],
                "ratio": best[False] / best[True],
            }
        )
        print(f"{name}: {exports[False]} exports {best[False]:.1f} s, {exports[True]} {best[True]:.1f} s")
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    add_result_options(parser)
    given = parser.parse_args()
    write_result("cpu__building", measure(), folder=given.out, commit=given.commit)


if __name__ == "__main__":
    main()
