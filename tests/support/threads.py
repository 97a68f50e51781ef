"""Calls of one object in several threads."""

import threading
from collections.abc import Callable
from typing import Any


def check_seeds_of_threads(made: Any, draw: Callable[[], Any]) -> None:
    """Check that each of two threads that draw with `made` goes on reading the seeds of its own call."""
    ready, found = threading.Barrier(2), {}

    def run(name: int) -> None:
        draw()
        own = made.last_seeds
        ready.wait()  # the other thread has called, too
        found[name] = own, made.last_seeds

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(before == after for before, after in found.values())
    assert found[0][0] != found[1][0]
    assert made.last_seeds in (found[0][0], found[1][0])  # this thread has made no call
