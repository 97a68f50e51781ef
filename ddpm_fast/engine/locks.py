"""Locks that a forked process finds free: the thread that held one does not exist there."""

import os
import threading
import weakref
from typing import Any

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


def make_lock() -> Any:
    """Return a threading.Lock."""
    return _registered(threading.Lock())


def make_reentrant_lock() -> Any:
    """Return a threading.RLock."""
    return _registered(threading.RLock())


def _registered(lock: Any) -> Any:
    _LOCKS.add(lock)
    return lock


def _free_all() -> None:
    for lock in list(_LOCKS):
        lock._at_fork_reinit()  # what Python's own modules call


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
