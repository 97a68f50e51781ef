"""Tests of the seeds of a batch, and of generators keyed by integers."""

import numpy as np
import pytest
import torch

from ddpm_fast.seeding import keyed_generator, parse_seeds, resolve_seeds, seed_tensor

TOP = 2**64 - 1


@pytest.mark.parametrize(
    "seeds",
    [
        7,
        np.int64(7),
        np.array(7),
        torch.tensor(7),
        range(7, 10),
        [7, 8, 9],
        (7, 8, 9),
        [np.uint64(7), 8, np.int32(9)],
        np.array([7, 8, 9], dtype=np.uint8),
        torch.tensor([7, 8, 9]),
    ],
    ids=["int", "int64", "0d-array", "0d-tensor", "range", "list", "tuple", "mixed", "array", "tensor"],
)
def test_three_seeds(seeds):
    resolved = resolve_seeds(seeds, 3)
    assert resolved == [7, 8, 9]
    assert all(type(seed) is int for seed in resolved)


def test_any_order_and_repeats():
    assert resolve_seeds([5, 1, 5], 3) == [5, 1, 5]
    assert resolve_seeds(range(9, 3, -3), 2) == [9, 6]


def test_the_whole_range():
    assert resolve_seeds(0, 1) == [0]
    assert resolve_seeds(TOP, 1) == [TOP]
    assert resolve_seeds(np.array([0, TOP], dtype=np.uint64), 2) == [0, TOP]


def test_none_is_fresh_and_consecutive():
    first, second = resolve_seeds(None, 4), resolve_seeds(None, 4)
    assert first == list(range(first[0], first[0] + 4))
    assert first != second  # equal with probability 2^-48


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1, 2], "seeds must be one a sample: 3 samples, got 2 seeds"),
        (range(4), "seeds must be one a sample: 3 samples, got 4 seeds"),
        ([], "seeds must be one a sample: 3 samples, got 0 seeds"),
        (-1, r"seeds must lie in \[0, 2\^64\), got -1"),
        ([1, -2, 3], r"seeds must lie in \[0, 2\^64\), got -2"),
        (torch.tensor([1, -2, 3]), r"seeds must lie in \[0, 2\^64\), got -2"),
        (2**64, r"seeds must lie in \[0, 2\^64\), got 18446744073709551616"),
        (TOP - 1, r"seeds must lie in \[0, 2\^64\), got 18446744073709551616"),  # the third sample's
    ],
    ids=["short", "long", "empty", "negative", "negative-one", "negative-tensor", "2^64", "runs-over"],
)
def test_bad_values(seeds, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        resolve_seeds(seeds, 3)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (1.0, "seeds must be an int, a range or sequence of ints, or None, got 1.0"),
        (True, "seeds must be an int, a range or sequence of ints, or None, got True"),
        ("123", "seeds must be an int, a range or sequence of ints, or None, got '123'"),
        (b"123", "seeds must be an int, a range or sequence of ints, or None, got b'123'"),
        ({1, 2, 3}, "seeds must be an int, a range or sequence of ints, or None, got {1, 2, 3}"),
        ([1, 2.0, 3], "seeds must be integers, got 2.0"),
        ([1, True, 3], "seeds must be integers, got True"),
        ([1, "2", 3], "seeds must be integers, got '2'"),
        (torch.ones(3), "seeds must be integers, got 1.0"),
        (torch.ones(3, dtype=torch.bool), "seeds must be integers, got True"),
        (np.ones((3, 1), dtype=np.int64), r"seeds must be integers, got \[1\]"),
    ],
    ids=["float", "bool", "str", "bytes", "set", "a-float", "a-bool", "a-str", "floats", "bools", "2d"],
)
def test_no_integers(seeds, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        resolve_seeds(seeds, 3)


def test_seed_tensor_keeps_the_bits():
    tensor = seed_tensor([0, 1, 2**63 - 1, 2**63, TOP])
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [0, 1, 2**63 - 1, -(2**63), -1]
    assert [value % 2**64 for value in tensor.tolist()] == [0, 1, 2**63 - 1, 2**63, TOP]
    assert seed_tensor([]).shape == (0,)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", [7]),
        ("0-15", list(range(16))),
        ("1,4,9-12", [1, 4, 9, 10, 11, 12]),
        (" 3 , 5-6 ", [3, 5, 6]),
        ("4-4", [4]),
        ("5,1,5", [5, 1, 5]),
        (str(TOP), [TOP]),
    ],
    ids=["one", "range", "list", "spaces", "short-range", "any-order", "largest"],
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "a", "-1", "1-", "-", "1--2", "1-2-3", "1.5", "1e3", "0x1", "1;2", "+1"]
)
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError) as error:
        parse_seeds(text)
    assert str(error.value) == f"seeds look like 7, 0-15 or 1,4,9-12, got {text!r}"


def test_seeds_backwards_or_endless():
    with pytest.raises(ValueError, match=r"^the seeds '9-4' run backwards$"):
        parse_seeds("1, 9-4")
    with pytest.raises(ValueError, match=r"^the seeds '0-10000000' are more than ten million$"):
        parse_seeds("0-10000000")


def draw(*key):
    return torch.rand(1000, generator=keyed_generator(*key), dtype=torch.float64)


def test_keyed_generator_depends_on_its_key_alone():
    torch.manual_seed(1)
    first = draw(3, 4)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(draw(3, 4), first)


def test_keyed_generator_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    draw(3, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_keyed_generator_known_answer():
    # The values are a file format: training noise and moons depend on them.
    assert keyed_generator(1, 2, 3).initial_seed() == 6498626229777268288


def test_keyed_generators_are_independent():
    keys = [(0,), (1,), (2,), (0, 1), (1, 0, 5), (0, 1, 5), (5, 1, 0), (2**40, 1), (2**64 - 1, 1)]
    draws = torch.stack([draw(*key) for key in keys])
    # correlations of 1000 pairs: standard deviation 0.032 each, 36 of them
    correlation = torch.corrcoef(draws) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 5 / 1000**0.5


def test_no_negative_keys():
    with pytest.raises(ValueError, match="non-negative"):
        keyed_generator(1, -2)
