"""ddpm_fast: exact samples of denoising diffusion models, with as little as possible besides the network."""

from ddpm_fast.adapters import accelerate
from ddpm_fast.config import SamplerConfig
from ddpm_fast.sample import Sampler, SampleResult

__version__ = "0.1.0"
__all__ = ["SampleResult", "Sampler", "SamplerConfig", "__version__", "accelerate"]
