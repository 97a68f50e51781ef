"""Seeds: torch generators keyed by integers, and the seeds of a batch of samples."""

import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Seeds = int | Sequence[int] | None


def keyed_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on the key alone.

    Two different keys of one length, with each part in [0, 2^32), give different generators.
    """
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def resolve_seeds(seeds: Seeds, batch: int) -> list[int]:
    """Return one 64-bit seed a sample.

    Args:
        seeds: An int s stands for s, s + 1, … s + batch - 1. A range, list, tuple or tensor holds `batch` ints. None
            draws a random s, so that one number reproduces the batch.
        batch: Number of samples.

    Raises:
        ValueError: The number of seeds is not the number of samples, or a seed is outside [0, 2^64).
        TypeError: A seed is no integer.
    """
    if seeds is None:
        seeds = secrets.randbits(48)
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.tolist()
    if isinstance(seeds, (int, np.integer)) and not isinstance(seeds, bool):
        values = list(range(int(seeds), int(seeds) + batch))
    elif isinstance(seeds, Sequence) and not isinstance(seeds, (str, bytes)):
        values = list(seeds)
    else:
        raise TypeError(f"seeds must be an int, a range or sequence of ints, or None, got {seeds!r}")
    if len(values) != batch:
        raise ValueError(f"seeds must be one a sample: {batch} samples, got {len(values)} seeds")
    for value in values:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"seeds must be integers, got {value!r}")
        if not 0 <= value < 2**64:
            raise ValueError(f"seeds must lie in [0, 2^64), got {value}")
    return [int(value) for value in values]


def seed_tensor(seeds: Sequence[int]) -> Tensor:
    """Return the 64 bits of every seed as int64 [len(seeds)], the form that the kernels take."""
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def parse_seeds(text: str) -> list[int]:
    """Parse seeds as people write them: "7", "0-15", "1,4,9-12"."""
    return [seed for part in text.split(",") for seed in _parse_range(part, text)]


def _parse_range(part: str, text: str) -> Iterable[int]:
    """Parse one seed or one range of seeds. `text` is the whole input, for the error message."""
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"seeds look like 7, 0-15 or 1,4,9-12, got {text!r}")
    low, high = int(first), int(last or first)
    if high < low:
        raise ValueError(f"the seeds {part.strip()!r} run backwards")
    if high - low >= 10_000_000:
        raise ValueError(f"the seeds {part.strip()!r} are more than ten million")
    return range(low, high + 1)
