"""ddpm_fast: exact samples of denoising diffusion models, with as little as possible besides the network.

Names and modules are imported when they are first read: torch takes more than a second.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_fast.adapters import accelerate
    from ddpm_fast.config import SamplerConfig
    from ddpm_fast.sample import Sampler, SampleResult

__version__ = "0.1.0"
__all__ = ["SampleResult", "Sampler", "SamplerConfig", "__version__", "accelerate"]

_MODULES = {"SampleResult": "sample", "Sampler": "sample", "SamplerConfig": "config", "accelerate": "adapters"}


def __getattr__(name: str) -> Any:
    """Return a public name of the package, or one of its modules."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name.isidentifier() and not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
