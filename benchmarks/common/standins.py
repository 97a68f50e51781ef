"""A stand-in for torchvision, which denoising-diffusion-pytorch imports for its training data only."""

import importlib.util
import runpy
import sys
import types
from collections.abc import Callable
from typing import NoReturn


class _Inert(types.ModuleType):
    """A module that has every name. Calling any of them raises RuntimeError."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError(f"torchvision's {name} is a stand-in")

        return unavailable


def run(script: str) -> None:
    """Run a script with the stand-in."""
    stand_in_for_torchvision()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def stand_in_for_torchvision() -> None:
    """Put an inert torchvision into `sys.modules` unless torchvision is installed.

    The wheels of torchvision do not work with torch for a CPU.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    package = _Inert("torchvision")
    for module in (package, _Inert("torchvision.transforms"), _Inert("torchvision.utils")):
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        sys.modules[module.__name__] = module
        if module is not package:
            setattr(package, module.__name__.rpartition(".")[2], module)
