"""What accelerated objects keep between calls, and calls inside of, beside and at the same time as one another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ddpm_fast.adapters.walk import KEPT, Options, Walker
from ddpm_fast.config import SamplerConfig
from ddpm_fast.table import Clipping, build_table
from tests.support.networks import Wavy

TABLE = build_table(SamplerConfig(num_inference_steps=5))
CPU = torch.device("cpu")


def loop_of(walker, batch=2, model=None, table=TABLE, **options):
    model = model or MODEL
    return walker.loop(model, (batch, 2, 4), table, Clipping(1.0), owner=model, device=CPU, **options)


MODEL = Wavy(2, 2)


@pytest.fixture
def walker():
    return Walker(Options("philox"))


def test_loops_of_several_shapes_are_kept_and_share_their_graphs_memory(walker):
    loops = [loop_of(walker, batch) for batch in (1, 2, 3)]
    assert [loop_of(walker, batch) for batch in (1, 2, 3)] == loops
    assert len({id(loop._pool) for loop in loops}) == 1
    assert walker.last_loop is loops[2]
    for batch in range(4, 4 + KEPT):
        loop_of(walker, batch)
    assert loop_of(walker, 3) is not loops[2]  # the last few, not all
    walker.free()
    assert walker.last_loop is None


def test_another_networks_loops_are_let_go(walker):
    loop_of(walker, 1)
    other = loop_of(walker, 1, model=Wavy(2, 2))
    assert [loop for _, loop in walker._loops] == [other]


def test_what_belongs_to_one_call_is_not_kept(walker):
    kept = loop_of(walker)
    assert loop_of(walker, correction=lambda step, x, output: x) is not kept
    walker.loop(MODEL, (2, 2, 4), TABLE, Clipping(1.0), owner=None, device=CPU)
    assert walker.last_loop is kept


def walk(walker, seed, generator=False):
    with walker.alone(generator) as own:
        loop = loop_of(own)
        return loop.run(own.noise(None, loop, seeds=[seed, seed + 1]), progress=False)


def test_threads_wait_for_one_another(walker):
    expected = [walk(walker, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: walk(walker, seed), range(16)))
    assert all(map(torch.equal, got, expected))
    assert len(walker._loops) == 1


def test_a_walk_inside_of_another_has_buffers_of_its_own(walker):
    expected = walk(walker, 7)
    with walker.alone() as outer:
        loop = loop_of(outer)
        steps = loop.steps(outer.noise(None, loop, seeds=[1, 2]), progress=False, every_step=True)
        next(steps)
        assert torch.equal(walk(walker, 7), expected)
        assert walker.last_seeds == [7, 8]
        for _ in steps:
            pass
    assert torch.equal(loop.x, walk(walker, 1))


def test_a_walk_beside_an_open_one_does_not_wait_for_it(walker):
    """A generator may be left open for good, by this thread or another."""
    expected = walk(walker, 7)
    opened = walker.alone(generator=True)
    own = opened.__enter__()
    loop = loop_of(own)
    results = []
    thread = threading.Thread(target=lambda: results.append(walk(walker, 7)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    results += [walk(walker, 7), walk(walker, 7, generator=True)]
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)
    closing = threading.Thread(target=opened.__exit__, args=(None, None, None))  # as the garbage collector might
    closing.start()
    closing.join()
    with walker.alone() as again:
        assert again is walker
        assert loop_of(again) is loop
