"""What `step` refuses, and in which words."""

import pytest
import torch

from ddpm_fast.kernels.step import step


def good():
    return {
        "x": torch.zeros(2, 3, 4),
        "output": torch.zeros(2, 3, 4),
        "coefficients": torch.zeros(5, 10),
        "ids": torch.zeros(5, 2, dtype=torch.int32),
        "base": torch.zeros(2, dtype=torch.int32),
    }


def long(*size):
    return torch.zeros(size, dtype=torch.int64)


ERRORS = {
    "x of one dimension": ({"x": torch.zeros(2)}, r"x must be a non-empty \[B, C, ...\] tensor, got shape \(2,\)"),
    "x empty": ({"x": torch.zeros(2, 0, 4)}, "x must be a non-empty"),
    "x float64": ({"x": torch.zeros(2, 3, 4).double()}, r"x must be one of \['torch.float32'\], got torch.float64"),
    "x strided": ({"x": torch.zeros(2, 4, 3).mT}, r"x must be contiguous, got strides \(12, 1, 3\) for shape"),
    "output short": ({"output": torch.zeros(1, 3, 4)}, r"output must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
    "output narrow": ({"output": torch.zeros(2, 2, 4)}, r"output must have shape \(2, 3, 4\), got \(2, 2, 4\)"),
    "output flat": ({"output": torch.zeros(24)}, r"output must have shape \(2, 3, 4\), got \(24,\)"),
    "output integer": ({"output": long(2, 3, 4)}, "output must be one of .* got torch.int64"),
    "output elsewhere": ({"output": torch.zeros(2, 3, 4, device="meta")}, "output must be on cpu, got meta"),
    "learned, not doubled": ({"learned": True}, r"output must have shape \(2, 6, 4\), got \(2, 3, 4\)"),
    "guided, one half": ({"guidance": torch.ones(2)}, r"output must have shape \(4, 3, 4\), got \(2, 3, 4\)"),
    "two halves, not guided": ({"output": torch.zeros(4, 3, 4)}, r"output must have shape \(2, 3, 4\)"),
    "coefficients narrow": ({"coefficients": torch.zeros(5, 8)}, r"coefficients must have shape \(5, 10\)"),
    "coefficients float64": ({"coefficients": torch.zeros(5, 10).double()}, "coefficients must be one of"),
    "ids int64": ({"ids": long(5, 2)}, r"ids must be one of \['torch.int32'\], got torch.int64"),
    "ids short": ({"ids": torch.zeros(4, 2).int()}, r"ids must have shape \(5, 2\), got \(4, 2\)"),
    "base int64": ({"base": long(2)}, r"base must be one of \['torch.int32'\], got torch.int64"),
    "base short": ({"base": torch.zeros(1).int()}, r"base must have shape \(2,\), got \(1,\)"),
    "base elsewhere": ({"base": torch.zeros(2, device="meta").int()}, "base must be on cpu, got meta"),
    "seeds int32": ({"seeds": long(2).int()}, "seeds must be one of"),
    "seeds short": ({"seeds": long(1)}, r"seeds must have shape \(2,\), got \(1,\)"),
    "seeds and z": ({"seeds": long(2), "z": torch.zeros(2, 3, 4)}, "noise comes from seeds or from z, not from both"),
    "z narrow": ({"z": torch.zeros(2, 2, 4)}, r"z must have shape \(2, 3, 4\)"),
    "z strided": ({"z": torch.zeros(2, 4, 3).mT}, "z must be contiguous"),
    "z float16": ({"z": torch.zeros(2, 3, 4).half()}, "z must be one of"),
    "x_new short": ({"x_new": torch.zeros(1, 3, 4)}, r"x_new must have shape \(2, 3, 4\)"),
    "x_new strided": ({"x_new": torch.zeros(2, 4, 3).mT}, "x_new must be contiguous"),
    "x0_new float16": ({"x0_new": torch.zeros(2, 3, 4).half()}, "x0_new must be one of"),
    "x0_new strided": ({"x0_new": torch.zeros(2, 4, 3).mT}, "x0_new must be contiguous"),
    "bound float64": ({"bound": torch.ones(2).double()}, "bound must be one of"),
    "bound of any shape": ({"bound": torch.ones(2, 1, 1)}, r"bound must have shape \(2,\), got \(2, 1, 1\)"),
    "guidance short": (
        {"guidance": torch.ones(1), "output": torch.zeros(4, 3, 4)},
        r"guidance must have shape \(2,\), got \(1,\)",
    ),
    "clip and bound": ({"clip": 1.0, "bound": torch.ones(2)}, "x0 is limited by clip or by bound, not by both"),
    "model_input of one half": (
        {"guidance": torch.ones(2), "output": torch.zeros(4, 3, 4), "model_input": torch.zeros(2, 3, 4)},
        r"model_input must have shape \(4, 3, 4\), got \(2, 3, 4\)",
    ),
    "model_input integer": ({"model_input": long(2, 3, 4)}, "model_input must be one of"),
    "model_input cropped": (
        {
            "x": torch.zeros(2, 3, 2, 2),
            "output": torch.zeros(2, 3, 2, 2),
            "model_input": torch.zeros(2, 3, 4, 4)[..., :2, :2],
        },
        r"model_input must be contiguous, channels_last or the like, got strides \(48, 16, 4, 1\)",
    ),
    "model_input expanded": (
        {"model_input": torch.zeros(2, 1, 4).expand(2, 3, 4)},
        "model_input must be contiguous, chan",
    ),
    "known without mask": ({"known": torch.zeros(2, 3, 4)}, "known and mask belong together"),
    "mask without known": ({"mask": torch.zeros(2, 3, 4)}, "known and mask belong together"),
    "known without seeds": (
        {"known": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 3, 4)},
        "known needs seeds: it is noised to the level",
    ),
    "mask of one channel": (
        {"known": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 1, 4), "seeds": long(2)},
        r"mask must have shape \(2, 3, 4\)",
    ),
    "mask of bytes": (
        {"known": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 3, 4).byte(), "seeds": long(2)},
        "mask must be one of",
    ),
    "known strided": ({"known": torch.zeros(2, 4, 3).mT}, "known must be contiguous"),
    "timestep int32": ({"timestep": long(2).int()}, r"timestep must be one of \['torch.int64'\], got torch.int32"),
    "timestep long": ({"timestep": long(4)}, r"timestep must have shape \(2,\), got \(4,\)"),
    "backend": ({"backend": "jax"}, r"backend must be one of \['triton', 'torch'\], got 'jax'"),
}


def shifted(count, *size):
    """Two tensors of one buffer, `count` elements apart."""
    buffer = torch.zeros(count + torch.Size(size).numel())
    return buffer[: -count or None].view(size), buffer[count:].view(size)


OVERLAPS = {
    "x_new over a part of x": ("x_new", "x", 1, (2, 3, 4)),
    "x0_new and x": ("x0_new", "x", 0, (2, 3, 4)),
    "x0_new and the end of x_new": ("x0_new", "x_new", 23, (2, 3, 4)),
    "x_new and output": ("x_new", "output", 0, (2, 3, 4)),
    "x_new and z": ("x_new", "z", 5, (2, 3, 4)),
    "model_input and x": ("model_input", "x", 0, (2, 3, 4)),
    "model_input and output": ("model_input", "output", 3, (2, 3, 4)),
    "x0_new and z": ("x0_new", "z", 0, (2, 3, 4)),
}


@pytest.mark.parametrize(("written", "other", "distance", "size"), OVERLAPS.values(), ids=list(OVERLAPS))
def test_overlaps(written, other, distance, size):
    first, second = shifted(distance, *size)
    with pytest.raises(ValueError, match=f"{written} must not share memory with {other}|{other} must not .* {written}"):
        step(**good() | {written: first, other: second})


def test_neighbours_do_not_overlap():
    first, second = shifted(24, 2, 3, 4)
    assert step(**good() | {"x": first, "x_new": second}) is second
    assert step(**good() | {"x": first, "x_new": first}) is first


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=list(ERRORS))
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**good() | changes)


def test_the_arguments_of_the_error_tests_are_good():
    assert step(**good()).shape == (2, 3, 4)


def test_an_option_that_there_is_not():
    with pytest.raises(TypeError, match=r"unknown options \['visit'\]; a step takes \['bound'"):
        step(**good(), visit=3)
