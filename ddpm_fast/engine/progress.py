"""A progress bar that never makes the host wait for the device."""

import io
import sys
from collections import deque
from typing import Any, TypeAlias

import torch
from tqdm import tqdm as std_tqdm
from tqdm.auto import tqdm

Show: TypeAlias = bool | str | std_tqdm | None  # values that `progress` may have


def make_bar(**options: Any) -> std_tqdm:
    """Return a tqdm bar on stderr; in a process without stderr (a daemon) a bar that shows nothing."""
    if sys.stderr is None:
        options |= {"file": io.StringIO(), "disable": True}
    return tqdm(**options)


def check_progress(show: Any) -> None:
    """Raise TypeError unless `show` is a value that `progress` may have."""
    if not (show is None or isinstance(show, (bool, str, std_tqdm))):
        raise TypeError(f"progress must be True, False, None, a label or a tqdm bar, got {type(show).__name__}")


class ProgressBar:
    """A bar that counts steps; on CUDA a step counts once the device has passed the step.

    CUDA events tell how far the device is, without a synchronisation.

    Args:
        total: Steps of the run.
        device: Device of the run.
        show: True or a label shows a bar, False shows none, None shows a bar on terminals only. A tqdm bar is
            continued.
        every: Steps between two events on CUDA.
    """

    def __init__(self, total: int, device: torch.device, show: Show, every: int = 10) -> None:
        check_progress(show)
        if isinstance(show, std_tqdm):
            self._bar = show
        else:
            label = show if isinstance(show, str) else None
            self._bar = make_bar(total=total, unit="step", desc=label, disable=None if show is None else not show)
        self._events: deque[torch.cuda.Event] | None = None
        if device.type == "cuda" and not self._bar.disable:
            self._events = deque()
        self._every = every
        self._issued = self._marked = 0

    def advance(self, steps: int) -> None:
        """Count `steps` more steps that the host has issued."""
        if self._events is None:
            self._bar.update(steps)
            return
        self._issued += steps
        while self._marked + self._every <= self._issued:
            self._marked += self._every
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
        while self._events and self._events[0].query():
            self._events.popleft()
            self._bar.update(self._every)

    def close(self, finished: bool) -> None:
        """Close the bar; with `finished`, fill it first."""
        if finished and not self._bar.disable:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()
