"""Output buffers that show what was not written and what was written outside."""

import math

import torch

MARGIN = 64  # elements on either side; keeps the middle as aligned as a fresh tensor
UNTOUCHED = 77


class Guarded:
    """`tensor` is the dense middle of a larger buffer: NaN (UNTOUCHED for integers), with guards around it.

    Row-major, or with the channels innermost.
    """

    def __init__(self, shape, dtype=torch.float32, device="cpu", channels_last=False):
        self._buffer = torch.full((math.prod(shape) + 2 * MARGIN,), UNTOUCHED, dtype=dtype, device=device)
        middle = self._buffer[MARGIN:-MARGIN]
        self.tensor = (
            middle.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if channels_last else middle.view(shape)
        )
        if dtype.is_floating_point:
            self.tensor.fill_(float("nan"))

    def is_intact(self):
        """Whether the guards hold what they held."""
        return bool((self._buffer[:MARGIN] == UNTOUCHED).all() and (self._buffer[-MARGIN:] == UNTOUCHED).all())


def guard_empty(monkeypatch):
    """Make torch.empty give guarded tensors, for wrappers that allocate; returns the list of those it gave."""
    given = []

    def empty(*shape, dtype=torch.float32, device="cpu"):
        given.append(Guarded(shape, dtype, device))
        return given[-1].tensor

    monkeypatch.setattr(torch, "empty", empty)
    return given
