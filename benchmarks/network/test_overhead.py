"""pytest-benchmark cases: a whole run of the embedded model, and the share of it that is not the network."""

from typing import Any

import pytest

from benchmarks.network import overhead
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler


@pytest.mark.parametrize(("batch", "steps"), [(1, 200), (16, 40)], ids=["batch 1", "batch 16"])
def test_run(benchmark: Any, batch: int, steps: int) -> None:
    checkpoint = load_checkpoint()
    sampler = Sampler(checkpoint.model, (batch, *checkpoint.shape), num_inference_steps=steps)
    benchmark.pedantic(sampler, kwargs={"seeds": 0, "progress": False}, rounds=3, warmup_rounds=1)
    row = overhead.measure(checkpoint, batch, steps)
    benchmark.extra_info.update(row)
    # The quietest run shows the cost of the loop; slower runs also show what else the machine was doing.
    assert row["share_lowest"] <= row["limit"]
