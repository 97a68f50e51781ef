"""Measure the loop's own time on a CPU, as a share of the network's time.

    python -m benchmarks.network.overhead      prints tables, writes cpu__overhead.json, cpu__check.json

The second table is of the call that a run of a hoisted network is compared with.

The network and the loop are timed in the same run, call by call, so a machine that slows down slows both.
"""

import statistics
import time
from typing import Any

from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, write_result
from ddpm_fast.engine.device import Model
from ddpm_fast.models.checkpoint import Checkpoint, load_checkpoint
from ddpm_fast.sample import Sampler

LIMITS = {1: 0.05, 16: 0.03}  # largest share allowed, by batch size
RUNS = 5
CHECK_LIMITS = {1000: 0.005, 50: 0.1}  # largest share of the comparison with the model, by steps


class Timed:
    """A model that adds up the time spent in it.

    Attributes:
        model: The model that is called.
        seconds: The time spent in the model so far.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seconds = 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        began = time.perf_counter()
        output = self.model(x, t)
        self.seconds += time.perf_counter() - began
        return output


def measure(checkpoint: Checkpoint, batch: int, steps: int, runs: int = RUNS) -> Row:
    """Return the median of (run - network) / network over several runs, and the times behind it."""
    timed = Timed(checkpoint.model)
    shape = (batch, *checkpoint.shape)
    sampler = Sampler(timed, shape, config=checkpoint.diffusion, num_inference_steps=steps, device="cpu")
    sampler(seeds=0, progress=False)
    shares, networks, overheads = [], [], []
    for run in range(runs):
        timed.seconds = 0.0
        began = time.perf_counter()
        sampler(seeds=run * batch, progress=False)
        whole = time.perf_counter() - began
        shares.append(whole / timed.seconds - 1)
        networks.append(timed.seconds / steps)
        overheads.append((whole - timed.seconds) / steps)
    return {
        "batch": batch,
        "steps": steps,
        "walks": runs,
        "share": statistics.median(shares),
        "share_lowest": min(shares),
        "share_highest": max(shares),
        "limit": LIMITS[batch],
        "network_us_per_step": 1e6 * statistics.median(networks),
        "loop_us_per_step": 1e6 * statistics.median(overheads),
    }


def measure_check(checkpoint: Checkpoint, steps: int, runs: int) -> Row:
    """Return the median of comparison / rest of the run, for runs of a hoisted network at batch 1."""
    sampler = Sampler(
        checkpoint.model, (1, *checkpoint.shape), config=checkpoint.diffusion, num_inference_steps=steps, device="cpu",
        optimize="hoist",
    )  # fmt: skip
    loop: Any = sampler.loop
    compare, seconds, shares = loop._agrees, 0.0, []

    def timed(*args: Any) -> bool:
        nonlocal seconds
        began = time.perf_counter()
        agrees: bool = compare(*args)
        seconds = time.perf_counter() - began
        return agrees

    loop._agrees = timed
    for run in range(runs + 1):
        began = time.perf_counter()
        sampler(seeds=run, progress=False)
        shares.append(seconds / (time.perf_counter() - began - seconds))
    shares = shares[1:]  # the first run allocates
    return {
        "steps": steps,
        "walks": runs,
        "share": statistics.median(shares),
        "share_lowest": min(shares),
        "share_highest": max(shares),
        "limit": CHECK_LIMITS[steps],
    }


def main() -> None:
    make_parser(__doc__).parse_args()
    checkpoint = load_checkpoint()
    rows = [measure(checkpoint, batch, steps) for batch, steps in ((1, 500), (16, 125))]
    for row in rows:
        print(
            "batch {batch:>3}: network {network_us_per_step:8.0f} us, loop {loop_us_per_step:6.0f} us a step, "
            "share {share:.1%} (limit {limit:.0%})".format(**row)
        )
    write_result("cpu__overhead", rows)
    rows = [measure_check(checkpoint, steps, runs) for steps, runs in ((1000, 3), (50, 21))]
    for row in rows:
        print("{steps} steps: the comparison adds {share:.2%} (limit {limit:.1%})".format(**row))
    write_result("cpu__check", rows)


if __name__ == "__main__":
    main()
