"""ddpm_fast: the same DDPM samples, exactly in law, many times faster."""

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine import Sampler, SampleResult

__version__ = "0.1.0"
__all__ = ["SampleResult", "Sampler", "SamplerConfig", "__version__"]
