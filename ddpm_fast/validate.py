"""Checks at the edge: each says in one sentence what is allowed and what came."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        span = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a finite number {span}, got {value!r}")


def whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer >= low (and <= high)."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an integer {span}, got {value!r}")


def known_names(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for the first of `given` that is not in `allowed`, naming the nearest one."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"unknown {kind} {name!r}; {hint}allowed are {sorted(allowed)}")
