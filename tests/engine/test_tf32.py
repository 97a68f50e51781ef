"""TF32 is what is asked for inside, and what it was outside, however torch's two kinds of switch are mixed."""

import contextlib
import itertools
import threading

import pytest
import torch

import ddpm_fast.engine.tf32
from ddpm_fast.engine.tf32 import tf32

TREE = hasattr(torch._C, "_get_fp32_precision_getter")
PLACES = [
    ("generic", "all"),
    ("cuda", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
]
DEFAULT = ("highest", True, "none", "none", "none", "tf32")
MIXTURES = [
    (matmul, cudnn, *own)
    for matmul in ("highest", "high", "medium")
    for cudnn in (False, True)
    for own in itertools.product(("none", "ieee", "tf32"), repeat=4)
]


def set_to(state):
    """Set the older switches, then the tree: of torch, of CUDA, of products, of convolutions and recurrent networks."""
    matmul, cudnn, generic, cuda, product, convolution = state
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    if TREE:
        for place, precision in zip(PLACES, (generic, cuda, product, convolution, convolution), strict=False):
            torch._C._set_fp32_precision_setter(*place, precision)


@pytest.fixture(autouse=True)
def as_before():
    yield
    set_to(DEFAULT)
    if TREE:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", "none")


def answers():
    """All that torch says, an error included."""
    found = [torch._C._get_fp32_precision_getter(*place) for place in PLACES] if TREE else []
    for ask in (torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("mixed")
    return found


def fingerprint():
    """What torch says now, and after changes that show which precisions are inherited. Changes the setting."""
    found = [answers()]
    for place, precision in itertools.product(PLACES[:2] if TREE else [], ("ieee", "tf32", "none")):
        torch._C._set_fp32_precision_setter(*place, precision)
        found.append(answers())
    for place, precision in itertools.product(PLACES[2:5] if TREE else [], ("ieee", "tf32")):
        torch._C._set_fp32_precision_setter(*place, precision)
        found.append(answers())  # where switch and tree agree again, the switch is seen
    return found


@pytest.mark.parametrize("allowed", [False, True])
def test_every_mixture_is_overruled_and_comes_back(allowed):
    for state in MIXTURES if TREE else [(matmul, cudnn, *DEFAULT[2:]) for matmul, cudnn, *_ in MIXTURES[::81]]:
        set_to(state)
        expected = fingerprint()
        set_to(state)
        with contextlib.suppress(KeyError), tf32(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 == allowed  # raises where switch and tree do not agree
            assert torch.backends.cudnn.allow_tf32 == allowed
            if TREE:
                precisions = {torch._C._get_fp32_precision_getter(*place) for place in PLACES[2:5]}
                assert precisions == {"tf32" if allowed else "ieee"}
            raise KeyError
        assert fingerprint() == expected, state


@pytest.mark.parametrize("allowed", [False, True])
def test_torch_before_the_tree(monkeypatch, allowed):
    monkeypatch.setattr(ddpm_fast.engine.tf32, "_TREE", False)
    for matmul, cudnn in itertools.product(("highest", "high", "medium"), (False, True)):
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        with tf32(allowed):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, cudnn)


def test_none_changes_nothing():
    before = answers()
    with tf32(None):
        assert answers() == before


def test_contexts_nest():
    before = answers()
    with tf32(True):
        with tf32(False):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert answers() == before


def test_threads_take_turns():
    """Contexts that overlap in time would put back one another's setting."""
    before, inside = answers(), []

    def run(allowed):
        for _ in range(50):
            with tf32(allowed):
                inside.append(torch.backends.cuda.matmul.allow_tf32 == allowed)

    threads = [threading.Thread(target=run, args=(allowed,)) for allowed in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 150
    assert all(inside)
    assert answers() == before


def test_the_compiler_may_ask():
    """torch.compile reads the older switch into its guards, which raises an error in a mixture."""
    for allowed in (False, True):
        with tf32(allowed):
            torch._dynamo.reset()
            assert torch.compile(lambda x: x @ x, backend="eager")(torch.ones(2, 2)).sum() == 8
