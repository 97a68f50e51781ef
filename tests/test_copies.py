"""Copies, pickles, forks and threads of samplers and accelerated objects draw what the original draws."""

import copy
import os
import pickle
import threading
import time

import pytest
import torch
from torch import nn

from ddpm_fast.engine.locks import make_lock, make_reentrant_lock
from ddpm_fast.sample import Sampler, sample
from tests.support.threads import check_seeds_of_threads

SHAPE = (2, 1, 4, 4)
STEPS = {"num_inference_steps": 8}
COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, shift=0.0):
        return 0.3 * self.layer(x) + shift


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("options", [{}, {"optimize": "hoist"}, {"speculate": 3}], ids=str)
def test_a_copy_of_a_sampler(kind, options):
    sampler = Sampler(Net().eval(), SHAPE, model_kwargs={"shift": torch.zeros(2, 1, 1, 1)}, **STEPS, **options)
    expected = sampler(seeds=1, model_kwargs={"shift": torch.ones(2, 1, 1, 1)})
    made = COPIES[kind](sampler)
    assert made.loop is not sampler.loop
    assert made.windows == sampler.windows
    assert torch.equal(made(seeds=1), expected)  # the last keywords stay
    assert torch.equal(sampler(seeds=1), expected)


def test_windows_that_were_measured_are_not_measured_again(monkeypatch):
    sampler = Sampler(Net().eval(), SHAPE, speculate=True, **STEPS)
    monkeypatch.setattr("ddpm_fast.speculation.choose._measured_plan", None)
    assert copy.deepcopy(sampler).windows == sampler.windows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_finds_locks_free():
    locks = [make_lock(), make_reentrant_lock()]
    held, done = threading.Event(), threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        held.set()
        done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if all(lock.acquire(timeout=5) for lock in locks) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_sampler_knows_its_own_callback_from_other_threads():
    sampler, failed, inside = Sampler(Net().eval(), SHAPE, **STEPS), [], threading.Event()

    def callback(step, t, x):
        inside.set()
        time.sleep(0.01)
        if step == 0:
            try:
                sampler(seeds=1)
            except RuntimeError as error:
                failed.append(str(error))

    thread = threading.Thread(target=lambda: sampler(seeds=1, callback=callback))
    thread.start()
    inside.wait()
    expected = sampler(seeds=1)  # waits for the other thread
    thread.join()
    assert failed == ["a sampler cannot be called from its own callback: build another"]
    assert torch.equal(sampler(seeds=1), expected)


WRONG = [
    {"seeds": -1}, {"seeds": [1]}, {"x_T": torch.zeros(3)}, {"mask": torch.ones(1)}, {"output": "film"},
    {"callback": 3}, {"progress": 3}, {"generator": 5},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("how", [{"speculate": True}, {"memory_format": "auto"}, {"optimize": "hoist"}], ids=str)
def test_arguments_of_a_call_are_refused_before_the_network_is_called(how, wrong):
    class Never(Net):
        def forward(self, x, t):
            raise AssertionError("the network was called")

    with pytest.raises((ValueError, TypeError)):
        sample(Never().eval(), SHAPE, **STEPS, **how, **wrong)


def test_every_thread_reads_the_seeds_of_its_own_last_call():
    sampler = Sampler(Net().eval(), SHAPE, **STEPS)
    check_seeds_of_threads(sampler, lambda: sampler())
