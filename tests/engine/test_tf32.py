"""TF32 is what is asked for inside, and what it was outside, however torch's two kinds of switch are mixed."""

import contextlib
import itertools
import subprocess
import sys
import threading
import types

import pytest
import torch

import ddpm_fast.engine.tf32
from ddpm_fast.engine.tf32 import tf32
from ddpm_fast.sample import Sampler
from tests.support.networks import Wavy

TREE = hasattr(torch._C, "_get_fp32_precision_getter")
ABOVE = [("generic", "all"), ("cuda", "all")]
PRODUCTS = [("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")]
ELSEWHERE = [("generic", "all"), *(("mkldnn", operation) for operation in ("all", "matmul", "conv", "rnn"))]
PLACES = [*ABOVE, *PRODUCTS, *ELSEWHERE[1:]]
PRECISIONS = ("none", "ieee", "tf32")
MATMUL = ("highest", "high", "medium")
PLAIN = ("highest", True, "none", "none", "none", "tf32")  # what a process begins with, up to torch 2.12


def get(*place):
    return torch._C._get_fp32_precision_getter(*place)


def put(place, precision):
    if TREE:
        torch._C._set_fp32_precision_setter(*place, precision)


def set_to(matmul, cudnn, generic, cuda, product, convolution):
    """Set the older switches, then the tree: of torch, of CUDA, of products, of convolutions and recurrent networks."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for place, precision in zip([*ABOVE, *PRODUCTS], (generic, cuda, product, convolution, convolution), strict=True):
        put(place, precision)


@pytest.fixture(autouse=True)
def as_before():
    yield
    set_to(*PLAIN)
    put(("mkldnn", "matmul"), "none")


def answers():
    """All that torch says, an error included."""
    found = [get(*place) for place in PLACES] if TREE else []
    for ask in (torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("mixed")
    return found


def fingerprint(changed):
    """What torch says now, and after changes that show which precisions are inherited. Changes the setting."""
    found = [answers()]
    for place, precision in itertools.product(changed if TREE else [], ("ieee", "tf32", "none")):
        put(place, precision)
        found.append(answers())  # where switch and tree agree again, the switch is seen
    return found


def check(state, changed, allowed):
    """Check that `allowed` holds inside, and what `state` has set holds again afterwards, after an exception, too."""
    state()
    expected = fingerprint(changed)
    state()
    elsewhere = [get(*place) for place in ELSEWHERE] if TREE else []
    with contextlib.suppress(KeyError), tf32(allowed):
        assert torch.backends.cuda.matmul.allow_tf32 == allowed  # raises where switch and tree do not agree
        if TREE:
            assert {get(*place) for place in PRODUCTS} == {"tf32" if allowed else "ieee"}
            assert [get(*place) for place in ELSEWHERE] == elsewhere
        if changed == PLACES:
            assert torch.backends.cudnn.allow_tf32 == allowed
        raise KeyError
    assert fingerprint(changed) == expected


MIXTURES = [(*older, *tree) for older in itertools.product(MATMUL, (False, True))
            for tree in itertools.product(PRECISIONS if TREE else ("none",), repeat=4)]  # fmt: skip


@pytest.mark.parametrize("allowed", [False, True])
def test_every_mixture_is_overruled_and_comes_back(allowed):
    for mixture in MIXTURES:
        check(lambda mixture=mixture: set_to(*mixture), PLACES, allowed)


def check_a_fresh_process():
    """Check every mixture in which nothing has been said of convolutions: what they begin with is never set again."""
    for allowed in (False, True):
        check(lambda: None, ABOVE, allowed)
    for matmul, product, *above in itertools.product(MATMUL, *[PRECISIONS if TREE else ("none",)] * 3):

        def state(matmul=matmul, product=product, above=above):
            torch.set_float32_matmul_precision(matmul)
            for place, precision in zip([PRODUCTS[0], *ABOVE], (product, *above), strict=True):
                put(place, precision)

        for allowed in (False, True):
            check(state, ABOVE, allowed)
    for place in [*ABOVE, PRODUCTS[0]]:
        put(place, "none")
    torch.set_float32_matmul_precision("highest")
    assert torch.backends.cudnn.allow_tf32


def test_a_fresh_process_is_as_fresh_afterwards():
    program = "from tests.engine.test_tf32 import check_a_fresh_process as check; check()"
    subprocess.run([sys.executable, "-c", program], check=True)


class OlderTorch:
    """Torch 2.8 as far as TF32 goes: it has the older switches alone."""

    def __init__(self, matmul, cudnn):
        self.matmul, self.cudnn = matmul, cudnn
        self._C = types.SimpleNamespace(
            _get_cudnn_allow_tf32=lambda: self.cudnn,
            _set_cudnn_allow_tf32=lambda value: setattr(self, "cudnn", value),
            _set_cublas_allow_tf32=lambda value: setattr(self, "matmul", "high" if value else "highest"),
        )

    def get_float32_matmul_precision(self):
        return self.matmul

    def set_float32_matmul_precision(self, value):
        self.matmul = value


@pytest.mark.parametrize("allowed", [False, True])
def test_torch_before_the_tree(monkeypatch, allowed):
    monkeypatch.setattr(ddpm_fast.engine.tf32, "_TREE", False)
    for matmul, cudnn in itertools.product(MATMUL, (False, True)):
        older = OlderTorch(matmul, cudnn)
        monkeypatch.setattr(ddpm_fast.engine.tf32, "torch", older)
        with contextlib.suppress(KeyError), tf32(allowed):
            assert (older.matmul != "highest", older.cudnn) == (allowed, allowed)
            raise KeyError
        assert (older.matmul, older.cudnn) == (matmul, cudnn)


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


@pytest.mark.filterwarnings("error")
def test_nothing_is_recommended_to_the_user():
    """Some versions of torch warn at each use of an older switch, or of a newer one."""
    for allowed in (False, True):
        with tf32(allowed):
            pass


def test_the_compiler_may_ask():
    """torch.compile reads the older switch into its guards, which raises an error in a mixture."""
    for allowed in (False, True):
        with tf32(allowed):
            torch._dynamo.reset()
            assert torch.compile(lambda x: x @ x, backend="eager")(torch.ones(2, 2)).sum() == 8


def test_what_the_compiler_leaves_behind_does_not_stay():
    """torch.compile writes the precision in force to the operation itself."""
    set_to(*PLAIN)
    before = fingerprint(PLACES)
    set_to(*PLAIN)
    torch._dynamo.reset()
    with tf32(False):
        torch.compile(lambda x: x @ x, backend="eager")(torch.ones(2, 2))
    assert fingerprint(PLACES) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": "hoist"},
        {"memory_format": "auto"},
        {"speculate": 3},
        {"speculate": {0: 2, 500: 3}, "optimize": "hoist"},
        {"speculate": True, "memory_format": "auto"},
    ],
    ids=str,
)
def test_the_network_is_never_called_outside(options, monkeypatch):
    """Not by a trial or a trace, either: the tables of what is hoisted are made of products, too."""
    inside, calls = [], []

    @contextlib.contextmanager
    def entered(allowed):
        inside.append(allowed)
        yield
        inside.pop()

    class Asking(Wavy):
        def forward(self, x, t):
            calls.append(bool(inside))
            return super().forward(x, t)

    monkeypatch.setattr("ddpm_fast.engine.base.tf32", entered)
    sampler = Sampler(Asking(2, 2), (1, 2, 4, 4), num_inference_steps=8, **options)
    sampler(seeds=1, progress=False)
    assert calls
    assert all(calls)
