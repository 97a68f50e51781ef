"""The structure of a network: all that decides what a call computes, besides the values of its tensors."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))  # what every module has; hooks and the training flag are looked at by themselves
_PLAIN = (int, float, bool, str, bytes, complex, type(None))
FLAGS = ("class", "training", "hooks")  # what is looked at besides attributes
_FEW = 64  # entries of a container that are compared one by one

Structure = dict[tuple[str, str], Any]


def structure_of(module: Any) -> Structure:
    """Return what a call depends on, by the path of the submodule and the name of the attribute.

    Plain values and small containers count by value, tensors by identity and version, all other objects by identity.
    A callable that is no module has no structure that could be looked at.
    """
    if not isinstance(module, nn.Module):
        return {}
    return {(path, name): value for path, each in module.named_modules() for name, value in _attributes(each)}


def changed_by(call: Callable[[], Any], module: Any) -> frozenset[tuple[str, str]]:
    """Return the attributes that a call of the network itself changes: a counter, a cache."""
    before = structure_of(module)
    call()
    after = structure_of(module)
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


def _comparable(value: Any, depth: int = 2) -> Any:
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if isinstance(value, Tensor):
        return id(value), value._version
    if depth and isinstance(value, (list, tuple)) and len(value) <= _FEW:
        return type(value), tuple(_comparable(each, depth - 1) for each in value)
    if depth and isinstance(value, dict) and len(value) <= _FEW:
        return type(value), tuple((str(key), _comparable(each, depth - 1)) for key, each in value.items())
    return id(value)
