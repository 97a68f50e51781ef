"""Devices and dtypes: where a model is, and where it can run."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Model = Callable[..., Any]


def resolve_device(model: Model, device: str | torch.device | None) -> torch.device:
    """Return the given device, else the model's own, else CUDA where there is a GPU.

    Raises:
        ValueError: There is no such device, or the model's parameters are on another one.
    """
    own = device_of(model)
    if device is None:
        return own or default_device()
    wanted = checked_device(device)
    if own is not None and own != wanted:
        raise ValueError(f"the model is on {own}, but device={str(device)!r}: move it with model.to(...) first")
    return wanted


def default_device() -> torch.device:
    """Return the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def checked_device(device: str | torch.device) -> torch.device:
    """Return the device with its index.

    Raises:
        ValueError: The device is neither the CPU nor a CUDA GPU of this machine.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not a device: {str(error).splitlines()[0]}") from error
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} is not there: torch finds no CUDA GPU")
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device {str(device)!r} is not there: torch finds {torch.cuda.device_count()} CUDA GPUs")
        wanted = torch.device("cuda", index)
    elif wanted.type != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda[:i]', got {str(device)!r}")
    return wanted


def device_of(model: Model) -> torch.device | None:
    """Return the device of the model's first parameter or buffer; None for a model without any."""
    if not isinstance(model, nn.Module):
        return None
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)


def dtype_of(model: Model) -> torch.dtype | None:
    """Return the dtype of the model's first floating point parameter; None for a model without any."""
    if not isinstance(model, nn.Module):
        return None
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def global_generator(device: torch.device) -> torch.Generator:
    """Return torch's global generator of the device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
