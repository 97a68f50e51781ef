"""Loading of models from disk, of this package or of another library, for `ddpm-fast sample --model`.

Weights are read as safetensors or with weights_only=True, so that no code in a file runs. `module:factory` runs the
caller's own code.
"""

import importlib
import re
import shlex
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.device import checked_device
from ddpm_fast.files import parse_json
from ddpm_fast.models.checkpoint import (
    EMBEDDED,
    Checkpoint,
    CheckpointError,
    Classes,
    check_weight,
    load_checkpoint,
    load_weights,
    read_weights_only,
)
from ddpm_fast.table import x0_coefficients
from ddpm_fast.times import Retimed, scaled_times
from ddpm_fast.validate import check_names, line_of

Arguments = Mapping[str, Any]

_PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
_MEANS = {"EPSILON": "epsilon", "START_X": "sample"}
_FROM_SCHEDULERS = (
    "num_train_timesteps", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing",
    "steps_offset", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value", "variance_type", "set_alpha_to_one",
)  # fmt: skip


def load_model(
    source: str | Path, arguments: Mapping[str, object] | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load a model with the diffusion that it was trained for.

    Args:
        source: "moons" or "digits", the embedded models; a checkpoint folder of this package; a diffusers folder of a
            DDPMPipeline, a DDIMPipeline or a UNet2DModel; a lucidrains Trainer's `model-N.pt`; a guided- or
            improved-diffusion checkpoint; or "module:factory". Such a function returns one of these models, or (model,
            shape) or (model, shape, config), with shape (C, H, W) and config a `SamplerConfig` or its fields.
        arguments: Arguments of the model. For a diffusers folder: changes to the configuration, fields of
            `SamplerConfig`. For a Trainer's file: {"unet": {…}, "diffusion": {…}}, the arguments of Unet and
            GaussianDiffusion. For a guided-diffusion file: its MODEL_FLAGS and DIFFUSION_FLAGS, and use_ddim and
            clip_denoised. For a factory: its keywords.
        device: Device of the network.

    Raises:
        ValueError, TypeError: The model is missing, broken or not supported; the message says which.
    """
    device = checked_device(device)
    arguments = dict(arguments or {})
    text, path = str(source), Path(source)
    if not path.exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        return _to_device(_from_factory(text, arguments), device)
    if path.is_file():
        return _to_device(_from_weights(path, arguments), device)
    kind = _diffusers_class(path)
    if kind is None:
        if arguments and not path.exists() and text not in EMBEDDED:
            raise CheckpointError(f"{path} does not exist: no folder, no file of weights, no embedded model")
        if arguments:
            raise ValueError(f"a checkpoint folder says itself what it holds: no arguments, got {min(arguments)}")
        return load_checkpoint(path, device)
    return _to_device(_from_diffusers(path, kind, arguments), device)


def parse_arguments(text: str) -> dict[str, object]:
    """Parse the model's arguments: a JSON object, the path of a file with one, or flags as guided-diffusion takes them.

    Raises:
        ValueError: The text is none of these.
    """
    if text.lstrip().startswith("-"):
        words = shlex.split(text)
        if len(words) % 2 or not all(re.fullmatch(r"--[A-Za-z]\w*", name) for name in words[::2]):
            raise ValueError(f"flags look like --image_size 64 --learn_sigma True, got {text!r}")
        return {name[2:]: _value(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    source = "the model's arguments"
    if not text.lstrip().startswith("{"):
        source = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the model's arguments are JSON, flags or a file: cannot read {source}") from error
    try:
        arguments = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{source}: must be a JSON object, got {type(arguments).__name__}")
    return arguments


def _value(word: str) -> bool | int | float | str:
    """Return the bool, int or float that a word stands for, or the word itself."""
    plain = {"True": True, "False": False, "true": True, "false": False}
    if word in plain:
        return plain[word]
    return next((kind(word) for kind in (int, float) if _parses(kind, word)), word)


def _parses(kind: type, word: str) -> bool:
    """Return True if `kind` can parse the word."""
    try:
        kind(word)
    except ValueError:
        return False
    return True


def _to_device(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """Move the network to its device, in eval mode; raise ValueError unless the samples are images."""
    if len(checkpoint.shape) != 3:
        raise ValueError(f"only images (C, H, W) are written to files, got samples of shape {checkpoint.shape}")
    if isinstance(checkpoint.model, nn.Module):
        checkpoint.model.eval().requires_grad_(False).to(device)
    return checkpoint


# diffusers


def _diffusers_class(folder: Path) -> str | None:
    """Return the class that a diffusers folder names, or None for another folder."""
    for name in ("model_index.json", "config.json"):
        try:
            config = parse_json((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and isinstance(config.get("_class_name"), str):
            return str(config["_class_name"])
    return None


def _from_diffusers(folder: Path, kind: str, arguments: Arguments) -> Checkpoint:
    """Load a diffusers folder of the class `kind`."""
    if kind not in ("DDPMPipeline", "DDIMPipeline", "UNet2DModel"):
        raise ValueError(
            f"{folder} holds a {kind}; the command line draws from a DDPMPipeline, DDIMPipeline or UNet2DModel: of "
            "others ddpm_fast.accelerate takes DiTPipeline, LDMPipeline and the schedulers"
        )
    diffusers = _library("diffusers", "diffusers")
    if kind == "UNet2DModel":
        checkpoint = _of_unet(_read_unet(diffusers, folder), SamplerConfig())
    else:
        index = parse_json((folder / "model_index.json").read_text(encoding="utf-8"))
        for part, allowed in (("unet", ["UNet2DModel"]), ("scheduler", ["DDPMScheduler", "DDIMScheduler"])):
            named = index.get(part)
            # The index may name any class, of the folder's own code too: none is imported by its name.
            if not isinstance(named, list) or named[:1] != ["diffusers"] or named[1:] not in [[one] for one in allowed]:
                raise CheckpointError(f"{folder}: its {part} must be diffusers' {' or '.join(allowed)}, got {named}")
        scheduler = getattr(diffusers, index["scheduler"][1])
        made = _tried(folder / "scheduler", lambda: scheduler.from_pretrained(str(folder / "scheduler")))
        checkpoint = _of_parts(_read_unet(diffusers, folder / "unet"), made)
    config = SamplerConfig.from_options(arguments, checkpoint.diffusion)
    return Checkpoint(checkpoint.model, config, checkpoint.shape, checkpoint.about, checkpoint.classes)


def _tried(folder: Path, read: Callable[[], Any]) -> Any:
    """Return what diffusers reads from a folder; raise CheckpointError, in one line, where that fails."""
    try:
        return read()
    except Exception as error:  # a damaged file fails in any way
        raise CheckpointError(f"{folder} cannot be loaded: {line_of(error)}") from error


def _read_unet(diffusers: Any, folder: Path) -> Any:
    """Read a UNet2DModel with weights for all of its parameters, of the only variant that there is."""
    stem = "diffusion_pytorch_model"
    plain = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin", ".safetensors.index.json")]
    variants = {file.name.split(".")[1] for file in folder.glob(f"{stem}.*.*") if file.suffix != ".json"}
    options: dict[str, Any] = {}
    if not any(file.exists() for file in plain) and variants:
        if len(variants) > 1:
            raise CheckpointError(f"{folder} holds weights of several variants, {sorted(variants)}: keep one")
        options["variant"] = variants.pop()
    read = diffusers.UNet2DModel.from_pretrained
    unet, about = _tried(folder, lambda: read(str(folder), local_files_only=True, output_loading_info=True, **options))
    if about["missing_keys"]:
        raise CheckpointError(f"{folder}: its weights lack {', '.join(sorted(about['missing_keys'])[:3])}")
    for name, value in unet.state_dict().items():
        check_weight(f"{folder}: {name}", value, value)
    return unet


def _of_pipeline(pipeline: Any) -> Checkpoint:
    """Return the checkpoint of a DDPMPipeline or a DDIMPipeline."""
    return _of_parts(pipeline.unet, pipeline.scheduler)


def _of_parts(unet: Any, scheduler: Any) -> Checkpoint:
    """Return the checkpoint of a UNet2DModel and its scheduler."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        raise ValueError(f"the pipeline's {type(scheduler).__name__} is not supported: DDPMScheduler or DDIMScheduler")
    fields = {name: scheduler.config[name] for name in _FROM_SCHEDULERS if scheduler.config.get(name) is not None}
    schedule = scheduler.config.beta_schedule
    if scheduler.config.trained_betas is not None or schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        fields["trained_betas"] = scheduler.betas.tolist()
        fields["rescale_betas_zero_snr"] = False  # the betas are already rescaled
    else:
        fields["beta_schedule"] = schedule
    if isinstance(scheduler, DDIMScheduler):
        steps = 50 if scheduler.config.num_train_timesteps > 50 else None  # diffusers' default, where it is possible
        fields |= {"sampler": "ddim", "previous_timestep": "stride", "num_inference_steps": steps}
    else:
        fields["noise_free"] = "t_zero"
    return _of_unet(unet, SamplerConfig.from_options(fields))


def _of_unet(unet: Any, config: SamplerConfig) -> Checkpoint:
    """Return the checkpoint of a UNet2DModel."""
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the UNet2DModel does not say how large its images are: sample_size is missing in its config")
    sizes = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sizes) != 2 or not all(isinstance(each, int) and each > 0 for each in sizes):
        raise ValueError(f"sample_size of the UNet2DModel must be one or two whole numbers, got {size!r}")
    count = getattr(unet.config, "num_class_embeds", None)
    classes = Classes("class_labels", int(count)) if count else None
    return Checkpoint(unet, config, (unet.config.in_channels, *sizes), {}, classes)


# denoising-diffusion-pytorch, guided-diffusion, improved-diffusion


def _from_weights(path: Path, arguments: Arguments) -> Checkpoint:
    """Load a file of weights of denoising-diffusion-pytorch, guided-diffusion or improved-diffusion."""
    if not arguments:
        raise ValueError(
            f"{path} holds weights alone: pass the arguments that the model was made with, "
            '{"unet": {…}, "diffusion": {…}} for lucidrains, MODEL_FLAGS for guided-diffusion'
        )
    if arguments.keys() & {"unet", "diffusion"}:
        return _from_trainer(path, arguments)
    return _from_guided(path, arguments)


def _from_trainer(path: Path, arguments: Arguments) -> Checkpoint:
    """Load a file of the Trainer of denoising-diffusion-pytorch."""
    library = _library("denoising_diffusion_pytorch", "denoising-diffusion-pytorch")
    from ddpm_fast.adapters.lucidrains import load_trainer_checkpoint

    check_names("section", arguments, ("unet", "diffusion"))
    given = {name: arguments.get(name, {}) for name in ("unet", "diffusion")}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"the model's arguments: {name} must be an object of names and values, got {value!r:.80}")
    kind = library.LearnedGaussianDiffusion if given["unet"].get("learned_variance") else library.GaussianDiffusion
    try:
        diffusion = kind(library.Unet(**given["unet"]), **given["diffusion"])
    except Exception as error:  # the library asserts and computes before it checks
        said = f"{type(error).__name__}: {line_of(error)}"
        raise ValueError(f"denoising-diffusion-pytorch makes no model of these arguments ({said})") from error
    return _of_lucidrains(load_trainer_checkpoint(path, diffusion))


def _of_lucidrains(diffusion: Any) -> Checkpoint:
    """Return the checkpoint of a GaussianDiffusion of denoising-diffusion-pytorch."""
    from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion

    from ddpm_fast.adapters.lucidrains import ddim_times

    if not isinstance(diffusion, GaussianDiffusion):
        raise ValueError(f"{type(diffusion).__name__} is not known to the command line: GaussianDiffusion of images is")
    learned = isinstance(diffusion, LearnedGaussianDiffusion)
    fields: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_timesteps,
        "trained_betas": diffusion.betas.tolist(),
        "prediction_type": "epsilon" if learned else _PREDICTIONS[diffusion.objective],
        "variance_type": "learned_range" if learned else "fixed_small",
    }
    if diffusion.is_ddim_sampling:
        fields |= {
            "sampler": "ddim",
            "eta": diffusion.ddim_sampling_eta,
            "ddim_direction": "x0",
            "timesteps": ddim_times(diffusion)[:-1].tolist(),
        }
    config = SamplerConfig(**fields)
    model = SelfConditioned(diffusion.model, config) if diffusion.self_condition else diffusion.model
    return Checkpoint(model, config, (diffusion.channels, *diffusion.image_size), {})


class SelfConditioned(nn.Module):
    """A wrapper that passes a network its own last x0 prediction (Chen et al. 2022), in any run whose timesteps fall.

    Args:
        model: The network, called as model(x, t, last). `last` is the clipped x0 prediction of the step before, and
            zeros in the first step.
        config: Schedule and prediction type of its training.
    """

    a: Tensor
    b: Tensor
    last: Tensor
    t: Tensor

    def __init__(self, model: nn.Module, config: SamplerConfig) -> None:
        super().__init__()
        self.model = model
        for name, column in zip("ab", x0_coefficients(config.prediction_type, config.alphas_cumprod()), strict=True):
            self.register_buffer(name, torch.from_numpy(column).float(), persistent=False)
        self.register_buffer("last", torch.zeros(0, dtype=torch.float32, device="cpu"), persistent=False)
        self.register_buffer("t", torch.zeros(0, dtype=torch.int64, device="cpu"), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the network's output. The state stays on the device, so that a CUDA graph can hold it."""
        if self.last.shape != x.shape:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside of that
                self.last = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
                self.t = torch.full(t.shape, -1, dtype=t.dtype, device=t.device)
        column = (-1,) + (1,) * (x.dim() - 1)
        falling = (t < self.t).view(column)  # otherwise a new run has begun
        output: Tensor = self.model(x, t, torch.where(falling, self.last, 0))
        self.last.copy_((self.a[t].view(column) * x + self.b[t].view(column) * output).clamp(-1, 1))
        self.t.copy_(t)
        return output

    def start_run(self) -> None:
        """Forget the last x0 prediction."""
        self.t.fill_(-1)


def _from_guided(path: Path, arguments: Arguments) -> Checkpoint:
    """Load weights of guided-diffusion or improved-diffusion into the network that their library makes."""
    from ddpm_fast.adapters.guided_diffusion import space_timesteps

    library = _guided_library()
    defaults = library.model_and_diffusion_defaults()
    check_names("flag", arguments, (*defaults, "use_ddim", "clip_denoised"))
    flags = {**defaults, **{name: value for name, value in arguments.items() if name in defaults}}
    respacing = str(flags.pop("timestep_respacing"))
    flags = {name: str(value) if isinstance(defaults[name], str) else value for name, value in flags.items()}
    model, diffusion = library.create_model_and_diffusion(**flags, timestep_respacing="")
    weights = read_weights_only(path, "file of weights")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} is no guided-diffusion checkpoint, which maps names to tensors")
    load_weights(model, weights, f"{path} does not fit its flags")
    steps = diffusion.num_timesteps
    ddim = bool(arguments.get("use_ddim", False))
    config = SamplerConfig(
        num_train_timesteps=steps,
        trained_betas=diffusion.betas.tolist(),
        prediction_type=_MEANS[diffusion.model_mean_type.name],
        variance_type=diffusion.model_var_type.name.lower(),
        clip_sample=bool(arguments.get("clip_denoised", True)),
        sampler="ddim" if ddim else "ddpm",
        ddim_direction="x0" if ddim else "output",
        timesteps=sorted(space_timesteps(steps, respacing), reverse=True) if respacing else None,
    )
    if flags.get("use_fp16"):
        model.convert_to_fp16()
    count = getattr(model, "num_classes", None)
    size = int(flags["image_size"])
    rescaled = Retimed(model, scaled_times(steps, 1000 / steps)) if diffusion.rescale_timesteps else model
    return Checkpoint(rescaled, config, (3, size, size), {}, Classes("y", count) if count else None)


def _guided_library() -> Any:
    """Return the module `script_util` of guided-diffusion or improved-diffusion."""
    for package in ("guided_diffusion", "improved_diffusion"):
        try:
            return importlib.import_module(f"{package}.script_util")
        except ModuleNotFoundError as error:
            if error.name and not error.name.startswith(package):
                raise ValueError(f"{package} needs {error.name}, which is not installed") from error
    raise ValueError(
        "guided-diffusion makes its networks itself and is not on PyPI: put a checkout of it, or of "
        "improved-diffusion, on PYTHONPATH"
    )


# module:factory


def _from_factory(text: str, arguments: Arguments) -> Checkpoint:
    """Call "module:factory" and return its model as a checkpoint."""
    module, _, name = text.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except ModuleNotFoundError as error:
        raise ValueError(f"{text}: no module {error.name!r}: is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"{text}: {error}") from error
    if not callable(factory):
        raise TypeError(f"{text} must be a function that returns a model, it is a {type(factory).__name__}")
    try:
        model = factory(**arguments)
    except Exception as error:  # the caller's own: no word of ours may stand in its place
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        raise RuntimeError(f"{text} raised {type(error).__name__}: {line_of(error)} ({where})") from error
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, tuple) and len(model) in (2, 3) and callable(model[0]):
        network, shape, *rest = model
        config = rest[0] if rest else SamplerConfig()
        config = config if isinstance(config, SamplerConfig) else SamplerConfig.from_options(config)
        return Checkpoint(network, config, tuple(shape), {})
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "diffusers" in packages and hasattr(model, "scheduler") and hasattr(model, "unet"):
        return _of_pipeline(model)
    if "denoising_diffusion_pytorch" in packages and isinstance(model, nn.Module) and hasattr(model, "betas"):
        return _of_lucidrains(model)
    raise TypeError(
        f"{text} must return (model, shape), (model, shape, config), a DDPMPipeline, a DDIMPipeline or a lucidrains "
        f"GaussianDiffusion, got {type(model).__name__}"
    )


def _library(package: str, distribution: str) -> Any:
    """Import a library; raise ValueError if it cannot be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the model is of {distribution}, which cannot be imported here: {error}") from error
