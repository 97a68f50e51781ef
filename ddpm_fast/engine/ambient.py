"""The settings of a process and a thread that a call of a model depends on besides its arguments."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ambient:
    """The settings that a model is called with.

    Attributes:
        device: Type of the model's device, "cpu" or "cuda".
        autocast: Dtype of torch.autocast; None where autocast is off.
        default_dtype: Dtype of floating point tensors that the model makes without naming one.
        deterministic: Whether torch takes deterministic algorithms alone.
    """

    device: str
    autocast: torch.dtype | None
    default_dtype: torch.dtype
    deterministic: bool

    @classmethod
    def now(cls, device: torch.device, lowered: torch.dtype | None = None) -> "Ambient":
        """Return the settings in force; `lowered` is the dtype of an autocast that is wanted whatever they say."""
        around = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(device.type, lowered or around, torch.get_default_dtype(), deterministic)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a call: autocast as it was, on or off.

        Autocast may not keep casts of weights: a recorded graph would read them after they are freed.
        """
        if self.autocast is None and not torch.is_autocast_enabled(self.device):
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
