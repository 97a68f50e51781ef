"""diffusers' unconditional and class-conditional pipelines on our sampling loop.

Signatures, progress bar, files and images are diffusers'; `seeds=` is new. A pipeline with a scheduler that is neither
DDPM nor DDIM (a DPMSolver, say) runs as in diffusers.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, LDMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_fast.adapters.diffusers_schedulers import FastDDIMScheduler, FastDDPMScheduler
from ddpm_fast.adapters.diffusers_tables import clipping_of, table_of
from ddpm_fast.adapters.runner import Accelerated, Options, Runner, adopt
from ddpm_fast.engine.call import Call
from ddpm_fast.seeding import Seeds
from ddpm_fast.validate import one_of, whole

logger = logging.getLogger("ddpm_fast")

Generators = torch.Generator | list[torch.Generator] | None
Output: TypeAlias = ImagePipelineOutput | tuple[Any]

_STEPS = (DDPMScheduler.step, DDIMScheduler.step, FastDDPMScheduler.step, FastDDIMScheduler.step)
_OUTPUTS = ("pil", "np", "numpy", "pt", None)


def is_supported(scheduler: Any) -> bool:
    """Return whether our loop can run in the scheduler's place."""
    supported = isinstance(scheduler, (DDPMScheduler, DDIMScheduler)) and type(scheduler).step in _STEPS
    if not supported:
        logger.info("%s is not accelerated: the pipeline runs as in diffusers", type(scheduler).__name__)
    return supported


class _FastPipeline(Accelerated):
    """A base of the fast pipelines: the runner and one sampling loop for all of them."""

    _stock: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        pipeline = super().__new__(cls)  # not in __init__, whose signature tells diffusers the components
        pipeline._runner = Runner(Options())
        return pipeline

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the folder that the pipeline of diffusers writes; both load the folder."""
        adopt(self, self._stock).save_pretrained(save_directory, **kwargs)

    def _left_to_diffusers(self, seeds: Seeds) -> bool:
        """Return whether the pipeline runs as in diffusers; raise ValueError where the call has seeds then."""
        scheduler = self.scheduler  # type: ignore[attr-defined]
        if is_supported(scheduler):
            return False
        if seeds is not None:
            raise ValueError(
                f"seeds need a DDPMScheduler or DDIMScheduler, not {type(scheduler).__name__}: pass a generator instead"
            )
        self._runner.last_seeds = self._runner.last_loop = None
        return True

    def _run(
        self,
        network: Any,
        shape: Sequence[int],
        steps: int,
        generator: Generators,
        seeds: Seeds,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        x_T: Callable[[], Tensor] | None = None,
        doubled: bool = False,
        **conditioning: Any,
    ) -> tuple[Tensor, list[int] | None]:
        """Run from noise to x_0; return x_0, float32, and the seeds if there are some.

        Args:
            network: A component of the pipeline.
            shape, steps, generator, seeds, eta, use_clipped_model_output: The arguments of the pipeline's call.
            x_T: A function that draws the start from the generator, for pipelines whose other noise comes from torch's
                global generator.
            doubled: See `table_of`.
            conditioning: Further arguments of `Call.of`.
        """
        scheduler, device = self.scheduler, self._execution_device  # type: ignore[attr-defined]
        whole("batch_size", shape[0], 1)
        whole("num_inference_steps", steps, 1)
        hooked = any("_hf_hook" in vars(m) or "_diffusers_hook" in vars(m) for m in network.modules())
        own, dtype = next(network.parameters()).device, network.dtype
        if not hooked and own != device:
            raise ValueError(f"the pipeline runs on {device}, but its network is on {own}: pipe.to(...)")
        scheduler = copy.deepcopy(scheduler)  # its timesteps are this run's alone, whatever other threads do
        scheduler.set_timesteps(steps)
        self.scheduler.set_timesteps(steps)  # type: ignore[attr-defined]  # as diffusers leaves it
        eta = eta if isinstance(scheduler, DDIMScheduler) else 0.0
        table = table_of(scheduler, eta=eta, use_clipped_model_output=use_clipped_model_output, doubled=doubled)
        _check_channels(network, shape[1], table.doubled, table.learned)
        # A plain function, because the pipeline decides on device and dtype, not the module.
        call = Call.of(
            lambda *args, **kwargs: network(*args, **kwargs), tuple(shape), device=device, dtype=dtype, module=network,
            **conditioning,
        )  # fmt: skip
        with self._runner.alone() as runner:
            loop = runner.loop(
                call,
                table,
                clipping_of(scheduler),
                owner=network,
                execution="eager" if hooked else None,  # hooks move weights while they run
                hoistable=not hooked,
            )
            if x_T is None:
                noise, start = runner.noise(generator, loop, seeds=seeds, dtype=dtype), None
            else:
                copies = 2 if call.guided else 1
                noise = runner.noise(generator, loop, seeds=seeds, dtype=dtype, copies=copies, z_from_global=True)
                start = None if runner.last_seeds is not None else x_T()
            bar = self.progress_bar(total=len(table))  # type: ignore[attr-defined]
            return loop.run(noise, start, progress=bar), runner.last_seeds

    def _images(self, images: Tensor, output_type: str | None, return_dict: bool, seeds: list[int] | None) -> Output:
        """Return the images, given on [-1, 1], in the form that the caller wants; with an attribute `seeds`."""
        images = (images / 2 + 0.5).clamp(0, 1)
        result: Any = images
        if output_type != "pt":
            result = images.float().cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                result = self.numpy_to_pil(result)  # type: ignore[attr-defined]
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        if not return_dict:
            return (result,)
        output = ImagePipelineOutput(images=result)
        output.seeds = seeds
        return output


class FastDDPMPipeline(_FastPipeline, DDPMPipeline):
    """A DDPMPipeline on our sampling loop."""

    _stock = DDPMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
    ) -> Output:
        """Draw images: the arguments of DDPMPipeline, and `seeds`, one for each image (an int s: s, s + 1, …)."""
        if self._left_to_diffusers(seeds):
            return super().__call__(batch_size, generator, num_inference_steps, output_type, return_dict)
        one_of("output_type", output_type, _OUTPUTS)
        x, drawn = self._run(self.unet, _image_shape(self.unet, batch_size), num_inference_steps, generator, seeds)
        return self._images(x.to(self.unet.dtype) if output_type == "pt" else x, output_type, return_dict, drawn)


class FastDDIMPipeline(_FastPipeline, DDIMPipeline):
    """A DDIMPipeline on our sampling loop."""

    _stock = DDIMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
    ) -> Output:
        """Draw images: the arguments of DDIMPipeline, and `seeds`, one for each image (an int s: s, s + 1, …)."""
        if self._left_to_diffusers(seeds):
            return super().__call__(
                batch_size, generator, eta, num_inference_steps, use_clipped_model_output, output_type, return_dict
            )
        one_of("output_type", output_type, _OUTPUTS)
        x, drawn = self._run(
            self.unet, _image_shape(self.unet, batch_size), num_inference_steps, generator, seeds,
            eta=eta, use_clipped_model_output=bool(use_clipped_model_output),
        )  # fmt: skip
        return self._images(x.to(self.unet.dtype) if output_type == "pt" else x, output_type, return_dict, drawn)


class FastLDMPipeline(_FastPipeline, LDMPipeline):
    """An LDMPipeline whose latents come from our sampling loop."""

    _stock = LDMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
        **kwargs: Any,
    ) -> Output:
        """Draw images: the arguments of LDMPipeline, and `seeds`, one for each image (an int s: s, s + 1, …)."""
        if self._left_to_diffusers(seeds):
            return super().__call__(batch_size, generator, eta, num_inference_steps, output_type, return_dict, **kwargs)
        one_of("output_type", output_type, _OUTPUTS)
        shape = _image_shape(self.unet, batch_size)
        x, drawn = self._run(
            self.unet, shape, num_inference_steps, generator, seeds, eta=eta,
            x_T=lambda: randn_tensor(shape, generator=generator),  # diffusers, too, draws on the CPU in float32
        )  # fmt: skip
        images = self.vqvae.decode((x / self.vqvae.config.scaling_factor).to(self.vqvae.dtype)).sample
        return self._images(images, output_type, return_dict, drawn)


class FastDiTPipeline(_FastPipeline, DiTPipeline):
    """A DiTPipeline whose latents come from our sampling loop; guidance is fused into the step."""

    _stock = DiTPipeline

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
    ) -> Output:
        """Draw images: the arguments of DiTPipeline, and `seeds`, one for each image (an int s: s, s + 1, …)."""
        if self._left_to_diffusers(seeds):
            return super().__call__(
                class_labels, guidance_scale, generator, num_inference_steps, output_type, return_dict
            )
        one_of("output_type", output_type, _OUTPUTS)
        if getattr(self.scheduler, "variance_type", "").startswith("learned"):
            raise ValueError("variance_type: DiTPipeline drops the network's variance, so it cannot be learned")
        config, device = self.transformer.config, self._execution_device
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device).reshape(-1)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        conditioning: dict[str, Any] = {"model_kwargs": {"class_labels": labels}}
        if guidance_scale > 1:
            nothing = torch.full_like(labels, 1000)  # the class number that means no class
            conditioning |= {"uncond_kwargs": {"class_labels": nothing}, "guidance_scale": guidance_scale}
        x, drawn = self._run(
            self.transformer, shape, num_inference_steps, generator, seeds,
            x_T=lambda: randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype),
            doubled=config.out_channels == 2 * config.in_channels, **conditioning,
        )  # fmt: skip
        images = self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return self._images(images, output_type, return_dict, drawn)


def _image_shape(unet: Any, batch: int) -> tuple[int, ...]:
    size = unet.config.sample_size
    return (batch, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))


def _check_channels(network: Any, channels: int, doubled: bool, learned: bool) -> None:
    config: Mapping[str, Any] = getattr(network, "config", {})
    out = config.get("out_channels")
    if out is not None and out != channels * (2 if doubled else 1):
        why = "needs a network with twice the channels" if learned else "takes a network with as many as its input"
        raise ValueError(f"out_channels: the network returns {out} channels for {channels}; the variance_type {why}")
