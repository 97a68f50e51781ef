"""The structure of a network: all that decides what a call computes, besides the values of its tensors."""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))  # what every module has; hooks and the training flag are looked at by themselves
_PLAIN = (int, float, bool, str, bytes, complex, type(None))
FLAGS = ("class", "training", "hooks")  # what is looked at besides attributes
_FEW = 64  # entries of a container that are compared one by one

Structure = dict[tuple[str, str], Any]


def structure_of(*models: Any) -> Structure:
    """Return what a call depends on, by the path of the submodule and the name of the attribute.

    Plain values, small containers and records of them count by value, tensors by identity and version, all other
    objects by identity.
    A model that is no module counts by the modules that it refers to.
    """
    return {
        (f"{number} {path}", name): value
        for number, module in enumerate(_distinct(models))
        for path, each in module.named_modules()
        for name, value in _attributes(each)
    }


def trains(*models: Any) -> bool:
    """Return whether any module of the models is in training mode."""
    return any(each.training for module in _distinct(models) for each in module.modules())


def _distinct(models: tuple[Any, ...]) -> list[nn.Module]:
    return list(dict.fromkeys(module for model in models for module in modules_in(model)))


def modules_in(model: Any, depth: int = 3) -> list[nn.Module]:
    """Return the model if it is a module, else the modules that it refers to: in its closure, its object, its partial.

    A model reaches other modules in ways that cannot be listed; each run compares its outputs as well.
    """
    if isinstance(model, nn.Module):
        return [model]
    if not depth:
        return []
    inside: list[Any] = []
    if isinstance(model, functools.partial):
        inside += [model.func, *model.args, *model.keywords.values()]
    elif inspect.ismethod(model):
        inside += [model.__self__, model.__func__]
    elif inspect.isfunction(model):
        for cell in model.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                inside.append(cell.cell_contents)
        globals_ = (model.__globals__.get(name) for name in model.__code__.co_names)
        inside += [value for value in globals_ if isinstance(value, nn.Module)]
    elif hasattr(model, "__dict__"):
        inside += vars(model).values()
    return [module for value in inside for module in modules_in(value, depth - 1)]


def changed_by(call: Callable[[], Any], *models: Any) -> frozenset[tuple[str, str]]:
    """Return the attributes that a call of the network itself changes: a counter, a cache."""
    before = structure_of(*models)
    call()
    after = structure_of(*models)
    return frozenset(key for key in before.keys() | after.keys() if before.get(key, _ABSENT) != after.get(key, _ABSENT))


_ABSENT = object()


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and the comparable values of what a submodule's call depends on."""
    yield "class", (id(module), type(module), id(type(module).forward))
    yield "training", module.training
    yield "hooks", tuple(map(id, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
    for name, value in vars(module).items():
        if name not in _OWN:
            yield name, _comparable(value)


def _comparable(value: Any, depth: int = 3) -> Any:
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if depth and isinstance(value, (list, tuple)) and len(value) <= _FEW:
        return type(value), tuple(_comparable(each, depth - 1) for each in value)
    if depth and isinstance(value, dict) and len(value) <= _FEW:
        return type(value), tuple((str(key), _comparable(each, depth - 1)) for key, each in value.items())
    record = isinstance(value, types.SimpleNamespace) or (
        dataclasses.is_dataclass(value) and hasattr(value, "__dict__")
    )
    if depth and record:
        return id(value), tuple((name, _comparable(each, depth - 1)) for name, each in vars(value).items())
    return id(value)
