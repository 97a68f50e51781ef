"""What the engine adds to the network calls, on the CPU: the loop's own time as a share of the network's.

Network and loop are timed in the same walk, call by call, so that a machine that slows down slows both.

    python -m benchmarks.network.overhead          prints a table and writes benchmarks/results/cpu__overhead.json
"""

import statistics
import time

from benchmarks.common.results import write_result
from ddpm_fast.models.checkpoint import Checkpoint, load_checkpoint
from ddpm_fast.sample import Sampler

LIMITS = {1: 0.05, 16: 0.03}  # batch size: largest share allowed
WALKS = 5


class Timed:
    """A model that adds up the time spent in it."""

    def __init__(self, model):
        self.model = model
        self.seconds = 0.0

    def __call__(self, x, t):
        began = time.perf_counter()
        output = self.model(x, t)
        self.seconds += time.perf_counter() - began
        return output


def measure(checkpoint: Checkpoint, batch: int, steps: int, walks: int = WALKS) -> dict:
    """Median over `walks` walks of (walk - network) / network, and the times behind it."""
    timed = Timed(checkpoint.model)
    shape = (batch, *checkpoint.shape)
    sampler = Sampler(timed, shape, config=checkpoint.diffusion, num_inference_steps=steps, device="cpu")
    sampler(seeds=0, progress=False)
    shares, networks, overheads = [], [], []
    for walk in range(walks):
        timed.seconds = 0.0
        began = time.perf_counter()
        sampler(seeds=walk * batch, progress=False)
        whole = time.perf_counter() - began
        shares.append(whole / timed.seconds - 1)
        networks.append(timed.seconds / steps)
        overheads.append((whole - timed.seconds) / steps)
    return {
        "batch": batch,
        "steps": steps,
        "walks": walks,
        "share": statistics.median(shares),
        "share_lowest": min(shares),
        "share_highest": max(shares),
        "limit": LIMITS[batch],
        "network_us_per_step": 1e6 * statistics.median(networks),
        "loop_us_per_step": 1e6 * statistics.median(overheads),
    }


def main() -> None:
    checkpoint = load_checkpoint()
    rows = [measure(checkpoint, batch, steps) for batch, steps in ((1, 500), (16, 125))]
    for row in rows:
        print(
            "batch {batch:>3}: network {network_us_per_step:8.0f} us, loop {loop_us_per_step:6.0f} us a step, "
            "share {share:.1%} (limit {limit:.0%})".format(**row)
        )
    write_result("cpu__overhead", rows)


if __name__ == "__main__":
    main()
