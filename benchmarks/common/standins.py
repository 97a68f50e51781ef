"""denoising-diffusion-pytorch imports torchvision for its training data; sampling never touches it."""

import importlib.util
import runpy
import sys
import types


class _Inert(types.ModuleType):
    """A module with every name; nothing in it can be called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*args, **kwargs):
            raise RuntimeError(f"torchvision's {name} is a stand-in")

        return unavailable


def run(script):
    """Run a script with it."""
    stand_in_for_torchvision()
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


def stand_in_for_torchvision():
    """Put an inert torchvision where there is none (its wheel does not go with torch for a CPU)."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        module = _Inert(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]
