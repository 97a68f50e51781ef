"""A progress bar that never makes the host wait for the device."""

from collections import deque
from typing import TypeAlias

import torch
from tqdm import tqdm as std_tqdm
from tqdm.auto import tqdm

Show: TypeAlias = bool | str | std_tqdm | None  # what `progress` may be


class Progress:
    """Counts steps; on CUDA a step counts once the device has passed it, which an event tells without waiting.

    Args:
        total: steps.
        show: True or a label, False, None for a bar on terminals only, or a tqdm bar to go on with.
        every: on CUDA, steps between two events.
    """

    def __init__(self, total: int, device: torch.device, show: Show, every: int = 10) -> None:
        if isinstance(show, std_tqdm):
            self._bar = show
        else:
            label = show if isinstance(show, str) else None
            self._bar = tqdm(total=total, unit="step", desc=label, disable=None if show is None else not show)
        self._events: deque[torch.cuda.Event] | None = None
        if device.type == "cuda" and not self._bar.disable:
            self._events = deque()
        self._every = every
        self._steps = self._marked = 0

    def advance(self, steps: int) -> None:
        """Note that the host has issued `steps` more."""
        if self._events is None:
            self._bar.update(steps)
            return
        self._steps += steps
        while self._marked + self._every <= self._steps:
            self._marked += self._every
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
        while self._events and self._events[0].query():
            self._events.popleft()
            self._bar.update(self._every)

    def close(self, finished: bool) -> None:
        """End the bar; `finished` says that all steps are done."""
        if finished and not self._bar.disable:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()
