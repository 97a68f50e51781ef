"""A model on disk: a folder with `config.json` and `model.safetensors`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.device import Model
from ddpm_fast.files import StrPath, parse_json, whole_file, write_json
from ddpm_fast.models.unet import UNet, UNetConfig
from ddpm_fast.validate import check_names, line_of

FORMAT = "ddpm_fast.checkpoint.v1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into names
EMBEDDED = {
    "moons": Path(__file__).parent.parent / "weights" / "moons32",
    "digits": Path(__file__).parent.parent / "weights" / "digits8",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, or of another format."""


@dataclass(frozen=True)
class Classes:
    """The class labels of a class-conditional network.

    Attributes:
        keyword: Name of the network's argument for the labels, int64 [B].
        count: Number of classes, which are 0 … count - 1.
        none: Label that means "no class". None if the network was not trained with one.
    """

    keyword: str
    count: int
    none: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A network with the diffusion that it was trained for.

    Attributes:
        model: The network, in eval mode.
        diffusion: Schedule and prediction type of the training, and the defaults of sampling.
        shape: Shape of one sample, (C, H, W).
        about: All other entries of config.json (data set, training).
        classes: Class labels of a class-conditional network, else None.
    """

    model: Model
    diffusion: SamplerConfig
    shape: tuple[int, ...]
    about: dict[str, Any]
    classes: Classes | None = None


def save_checkpoint(
    folder: StrPath,
    model: UNet,
    diffusion: SamplerConfig,
    about: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `model` to `folder`, its weights rounded to `dtype`. Each file is written whole or not at all.

    A tensor with values that `dtype` cannot hold keeps its own.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: _rounded(value.detach().cpu(), dtype).contiguous() for name, value in model.state_dict().items()}
    write_safetensors(path / WEIGHTS_FILE, weights, {"format": "pt"})
    config = {"format": FORMAT, "network": model.config.to_dict(), "diffusion": diffusion.to_dict(), **(about or {})}
    write_json(path / CONFIG_FILE, config)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.isfinite(), tensor.isfinite()) else tensor


def load_checkpoint(folder: StrPath = "moons", device: str | torch.device = "cpu") -> Checkpoint:
    """Load a checkpoint folder, or the embedded model "moons" or "digits" if no folder has that name.

    Raises:
        CheckpointError: The checkpoint is missing or broken; the message says how.
    """
    path = Path(folder)
    if not path.exists():
        path = EMBEDDED.get(str(folder), path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path}")
    config = read_config(path)
    network, diffusion = config.pop("network"), config.pop("diffusion")
    try:
        check_names("network field", network, UNetConfig.__dataclass_fields__)
        unet_config = UNetConfig(**network)
        sampler_config = SamplerConfig.from_options(diffusion)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error}") from error
    weights = read_safetensors(path / WEIGHTS_FILE)
    try:
        with torch.device("meta"):
            UNet(unet_config)
        model = UNet(unet_config)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: there is no room for such a network: {line_of(error)}") from error
    load_weights(model, weights, f"{path / WEIGHTS_FILE} does not fit its config.json")
    shape = (unet_config.channels, unet_config.image_size, unet_config.image_size)
    count = unet_config.num_classes
    classes = None if count is None else Classes("class_labels", count, none=count)
    return Checkpoint(model.eval().requires_grad_(False).to(device), sampler_config, shape, config, classes)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: The file cannot be written, for example on a full disk.
    """
    with whole_file(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: The file is missing or unreadable.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def read_weights_only(path: StrPath, kind: str, device: str | torch.device = "cpu") -> object:
    """Read a file of torch.save without running code from it.

    Raises:
        OSError: The file cannot be opened.
        CheckpointError: The file cannot be read; the message says that it is no such `kind`.
    """
    try:
        contents: object = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of another kind can fail in any way
        raise CheckpointError(f"{path} is no {kind}: torch.load cannot read it") from error
    return contents


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], message: str) -> None:
    """Load `weights` into `model`. Prefixes that torch.compile and DistributedDataParallel add to names do not count.

    Raises:
        CheckpointError: The weights do not fit, or are no finite numbers. The error says `message` and the reason;
            nothing is loaded then.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        weights = plain_names(weights, message)
    for problem, names in (("it lacks", own.keys() - weights.keys()), ("it has besides", weights.keys() - own.keys())):
        if names:
            raise CheckpointError(f"{message}: {problem} {', '.join(sorted(names)[:3])} ({len(names)})")
    for name, value in weights.items():
        check_weight(f"{message}: {name}", value, own[name])
    model.load_state_dict(weights)


def plain_names(weights: Any, message: str) -> dict[str, torch.Tensor]:
    """Return weights by their names without the prefixes of wrappers; raise CheckpointError unless all are tensors."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{message}: weights must be tensors by name")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{message}: {name} must be a tensor, got {type(value).__name__}")
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): v for name, v in weights.items()}
    return plain if len(plain) == len(weights) else weights


def check_weight(name: str, value: torch.Tensor, own: torch.Tensor) -> None:
    """Raise CheckpointError unless a tensor can stand for the model's own: shape, kind of number, finite, in memory."""
    if value.shape != own.shape:
        raise CheckpointError(f"{name} must have shape {tuple(own.shape)}, got {tuple(value.shape)}")
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{name} must be a dense tensor with values, got {value.layout} on {value.device}")
    if value.is_floating_point() != own.is_floating_point() or value.is_complex() != own.is_complex():
        raise CheckpointError(f"{name} must be {own.dtype} or the like, got {value.dtype}")
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{name} must be finite, got NaN or infinity")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and return all entries but the format.

    Raises:
        CheckpointError: The file is missing, is no JSON, or is no configuration of a checkpoint.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a checkpoint folder")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a ddpm_fast checkpoint (no format {FORMAT!r})")
    missing = [name for name in ("network", "diffusion") if not isinstance(config.get(name), dict)]
    if missing:
        raise CheckpointError(f"{path} lacks the section {missing[0]!r}")
    return config
