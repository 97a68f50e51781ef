"""What accelerated objects keep between calls, and calls inside of, beside and at the same time as one another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ddpm_fast.adapters.runner import KEPT, Options, Runner
from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.call import Call
from ddpm_fast.table import Clipping, build_table
from tests.support.networks import Wavy

TABLE = build_table(SamplerConfig(num_inference_steps=5))
CPU = torch.device("cpu")


def loop_of(runner, batch=2, model=None, table=TABLE, **options):
    model = model or MODEL
    return runner.loop(Call.of(model, (batch, 2, 4), device=CPU), table, Clipping(1.0), owner=model, **options)


MODEL = Wavy(2, 2)


@pytest.fixture
def runner():
    return Runner(Options("philox"))


def test_loops_of_several_shapes_are_kept_and_share_their_graphs_memory(runner):
    loops = [loop_of(runner, batch) for batch in (1, 2, 3)]
    assert [loop_of(runner, batch) for batch in (1, 2, 3)] == loops
    assert len({id(loop._pool) for loop in loops}) == 1
    assert runner.last_loop is loops[2]
    for batch in range(4, 4 + KEPT):
        loop_of(runner, batch)
    assert loop_of(runner, 3) is not loops[2]  # the last few, not all
    runner.free()
    assert runner.last_loop is None


def test_another_networks_loops_are_let_go(runner):
    loop_of(runner, 1)
    other = loop_of(runner, 1, model=Wavy(2, 2))
    assert [loop for _, loop in runner._loops] == [other]


def test_what_belongs_to_one_call_is_not_kept(runner):
    kept = loop_of(runner)
    assert loop_of(runner, correction=lambda step, x, output: x) is not kept
    runner.loop(Call.of(MODEL, (2, 2, 4), device=CPU), TABLE, Clipping(1.0), owner=None)
    assert runner.last_loop is None
    assert [loop for _, loop in runner._loops] == [kept]


def walk(runner, seed, generator=False):
    with runner.alone(generator) as own:
        loop = loop_of(own)
        return loop.run(own.noise(None, loop, seeds=[seed, seed + 1]), progress=False)


def test_threads_wait_for_one_another(runner):
    expected = [walk(runner, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: walk(runner, seed), range(16)))
    assert all(map(torch.equal, got, expected))
    assert len(runner._loops) == 1


def test_a_walk_inside_of_another_has_buffers_of_its_own(runner):
    expected = walk(runner, 7)
    with runner.alone() as outer:
        loop = loop_of(outer)
        steps = loop.steps(outer.noise(None, loop, seeds=[1, 2]), progress=False, every_step=True)
        next(steps)
        assert torch.equal(walk(runner, 7), expected)
        assert runner.last_seeds == [7, 8]
        for _ in steps:
            pass
    assert torch.equal(loop.x, walk(runner, 1))


def test_a_walk_beside_an_open_one_does_not_wait_for_it(runner):
    """A generator may be left open for good, by this thread or another."""
    expected = walk(runner, 7)
    opened = runner.alone(iterator=True)
    own = opened.__enter__()
    loop = loop_of(own)
    results = []
    thread = threading.Thread(target=lambda: results.append(walk(runner, 7)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    results += [walk(runner, 7), walk(runner, 7, generator=True)]
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)
    closing = threading.Thread(target=opened.__exit__, args=(None, None, None))  # as the garbage collector might
    closing.start()
    closing.join()
    with runner.alone() as again:
        assert again is runner
        assert loop_of(again) is loop
