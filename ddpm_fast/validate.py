"""Checks at the edge: each says in one sentence what is allowed and what came; and what others said, in one line."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def within(name: str, value: Any, low: float, high: float, ends: str = "[]") -> float:
    """Return `value` as a float; raise ValueError unless it is a finite number in the interval with such `ends`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    above = number and (low <= value if ends[0] == "[" else low < value)
    below = number and (value <= high if ends[1] == "]" else value < high)
    if not (above and below):
        raise ValueError(f"{name} must be a finite number in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer >= low (and <= high)."""
    ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an integer {span}, got {value!r}")
    return int(value)


def known_names(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for the first of `given` that is not in `allowed`, naming the nearest one."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"unknown {kind} {name!r}; {hint}allowed are {sorted(allowed)}")


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
