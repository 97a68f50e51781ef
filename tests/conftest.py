"""Where the kernels run in the tests: on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

import itertools
import math
import os

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported

torch.set_num_threads(1)  # tensors this small are faster on one thread, many times so on a busy machine


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where backend="triton" can run."""
    if not HAS_GPU:
        from triton.runtime.interpreter import InterpreterBuilder

        # As on a GPU: Triton's maximum and minimum drop NaN unless they are told to propagate it.
        InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
        InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Return names of folders that are not there yet."""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches, monkeypatch):
    """Let every test begin without choices that measurements have made, and leave the user's alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(caches)))


@pytest.fixture(autouse=True)
def plain_callables_run_on_the_cpu(request, monkeypatch):
    """Where there is a GPU, a model without parameters would go there; only what asks for it does."""
    if not request.node.get_closest_marker("gpu") and "kernel_device" not in request.fixturenames:
        monkeypatch.setattr("ddpm_fast.engine.device.default_device", lambda: torch.device("cpu"))


@pytest.fixture(autouse=True)
def a_slow_machine_hoists_nothing_by_itself(monkeypatch):
    """The default hoists after so many seconds; which run of a test that is must not depend on the machine."""
    monkeypatch.setattr("ddpm_fast.engine.network.Network.seconds_to_hoist", math.inf)


@pytest.fixture
def exports(monkeypatch):
    """Return the batch sizes of the exports that torch makes."""
    sizes, export = [], torch.export.export

    def counted(model, args, *rest, **named):
        sizes.append(len(args[0]))
        return export(model, args, *rest, **named)

    monkeypatch.setattr(torch.export, "export", counted)
    return sizes


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, visibly, where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
