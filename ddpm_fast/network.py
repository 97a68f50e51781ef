"""The network as the engine sees it: fixed buffers in, one checked tensor out."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("ddpm_fast")

Model = Callable[..., Any]


class Network:
    """Calls `model(x, t, **model_kwargs)` on buffers that never move.

    Args:
        model: any callable that returns a tensor, an object with `.sample`, or a tuple that begins with a tensor.
        shape: (B, C, ...).
        out_channels: channels that the output must have.
        model_kwargs: passed on; tensors are copied to the device once.
        uncond_kwargs: with guidance, the same names for the unconditional half; the batch is then doubled,
            conditional half first.
        device, dtype: of what the network is given. Where its parameters have another dtype, it runs under autocast.

    Attributes:
        input: the x that the network reads next, `dtype`, [B or 2B, C, ...].
        timestep: the t that it reads next, int64 [B or 2B].
    """

    def __init__(
        self,
        model: Model,
        shape: tuple[int, ...],
        out_channels: int,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable model(x, t, **model_kwargs), got {type(model).__name__}")
        self.model = model
        self.guided = uncond_kwargs is not None
        self.device = resolve_device(model, device)
        own = _parameter(model)
        own_dtype = own.dtype if own is not None else None
        self.dtype = dtype or own_dtype or torch.float32
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, got {self.dtype}")
        self._autocast = own_dtype is not None and own_dtype != self.dtype
        _warn_if_training(model)
        batch = shape[0] * (2 if self.guided else 1)
        self.batch = shape[0]
        self.input = torch.zeros(batch, *shape[1:], dtype=self.dtype, device=self.device)
        self.timestep = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.output_shape = (batch, out_channels, *shape[2:])
        self.kwargs = self._static_kwargs(dict(model_kwargs or {}), uncond_kwargs)

    def __call__(self) -> Tensor:
        """The model's output for the buffers as they are, its shape checked: [B or 2B, out_channels, ...]."""
        output = self.model(self.input, self.timestep, **self.kwargs)
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"model must return a tensor or an object with a tensor .sample, got {type(output).__name__}"
                )
        if tuple(output.shape) != self.output_shape:
            raise ValueError(self._shape_error(tuple(output.shape)))
        if not output.is_floating_point():
            raise ValueError(f"the model must return floating point numbers, got {output.dtype}")
        return output

    @contextlib.contextmanager
    def precision(self, capturing: bool = False) -> Iterator[None]:
        """Autocast where the network's parameters have another dtype than its input, and no gradients."""
        with torch.no_grad():
            if not self._autocast:
                yield
                return
            # Weights that autocast has converted are kept for the whole walk, but must not leave a recording.
            with torch.autocast(self.device.type, self.dtype, cache_enabled=not capturing):
                yield

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """Copy new values into the buffers; names, shapes and everything that is no tensor must stay as they were."""
        fresh = self._static_kwargs(dict(model_kwargs), uncond_kwargs)
        if fresh.keys() != self.kwargs.keys():
            raise ValueError(f"model_kwargs must keep the names {sorted(self.kwargs)}, got {sorted(fresh)}")
        for name, value in fresh.items():
            held = self.kwargs[name]
            if isinstance(held, Tensor) and isinstance(value, Tensor):
                if held.shape != value.shape or held.dtype != value.dtype:
                    raise ValueError(
                        f"model_kwargs[{name!r}] must keep shape {tuple(held.shape)} and {held.dtype}, "
                        f"got {tuple(value.shape)} and {value.dtype}"
                    )
            elif isinstance(held, Tensor) or isinstance(value, Tensor) or held != value:
                raise ValueError(f"model_kwargs[{name!r}] was {held!r} when the sampler was built, got {value!r}")
        for name, value in fresh.items():
            if isinstance(value, Tensor):
                self.kwargs[name].copy_(value)

    def _static_kwargs(self, cond: dict[str, Any], uncond: Mapping[str, Any] | None) -> dict[str, Any]:
        if self.guided:
            if uncond is None or cond.keys() != uncond.keys():
                raise ValueError(
                    f"uncond_kwargs must have the names of model_kwargs, {sorted(cond)}, got {sorted(uncond or {})}"
                )
            cond = {name: self._join(name, value, uncond[name]) for name, value in cond.items()}
        return {
            name: value.detach().to(self.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in cond.items()
        }

    def _join(self, name: str, cond: Any, uncond: Any) -> Any:
        if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
            if cond.shape != uncond.shape or not cond.dim() or len(cond) != self.batch:
                raise ValueError(
                    f"with guidance, model_kwargs[{name!r}] and uncond_kwargs[{name!r}] must have equal shapes "
                    f"({self.batch}, ...), got {tuple(cond.shape)} and {tuple(uncond.shape)}"
                )
            return torch.cat([cond.to(self.device), uncond.to(self.device, cond.dtype)])
        if isinstance(cond, Tensor) or isinstance(uncond, Tensor) or cond != uncond:
            raise ValueError(
                f"model_kwargs[{name!r}] and uncond_kwargs[{name!r}] must be two tensors or equal, "
                f"got {cond!r} and {uncond!r}"
            )
        return cond

    def _shape_error(self, shape: tuple[int, ...]) -> str:
        hint = ""
        if len(shape) == len(self.output_shape) and shape[1] == 2 * self.output_shape[1]:
            hint = "; twice the channels: a network with a learned variance needs variance_type='learned_range'"
        elif len(shape) == len(self.output_shape) and 2 * shape[1] == self.output_shape[1]:
            hint = "; half the channels: a network without a learned variance needs another variance_type"
        return f"the model must return shape {self.output_shape}, got {shape}{hint}"


def resolve_device(model: Model, device: str | torch.device | None) -> torch.device:
    """The device to run on: the given one, the model's own, or CUDA if it is there.

    Raises:
        ValueError: no such device, or the model's parameters are on another.
    """
    own = _parameter(model)
    if device is None:
        if own is not None:
            return own.device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
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
    if own is not None and own.device != wanted:
        raise ValueError(f"the model is on {own.device}, but device={str(device)!r}: move it with model.to(...) first")
    return wanted


def _parameter(model: Model) -> Tensor | None:
    """The first floating point parameter, which speaks for the model's device and dtype."""
    if not isinstance(model, nn.Module):
        return None
    return next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)


def _warn_if_training(model: Model) -> None:
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    if isinstance(model, nn.Module) and any(m.training for m in model.modules() if isinstance(m, random)):
        logger.warning("the model is in training mode (dropout or batch norm are active): call model.eval() first")
