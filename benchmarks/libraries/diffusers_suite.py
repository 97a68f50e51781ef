"""diffusers' own scheduler tests, run against its classes and against ours.

    python -m benchmarks.libraries.diffusers_suite CHECKOUT    of diffusers, or a folder that holds its tests/

Three times: with diffusers' classes, with ours as they are on a CPU (diffusers' own step), and with ours where the
fused step is taken as on CUDA. Writes benchmarks/results/diffusers_suite.json; fails where one of ours fails a test
that diffusers' class passes.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from benchmarks.common.results import write_result
from ddpm_fast.adapters.diffusers import FastDDIMScheduler, FastDDPMScheduler

FILES = ("test_scheduler_ddpm.py", "test_scheduler_ddim.py")


class FusedDDPMScheduler(FastDDPMScheduler):
    """Takes on a CPU the path that CUDA takes."""

    _backend = "torch"


class FusedDDIMScheduler(FastDDIMScheduler):
    """Takes on a CPU the path that CUDA takes."""

    _backend = "torch"


RUNS = {
    "diffusers": {},
    "ddpm_fast": {"DDPMScheduler": FastDDPMScheduler, "DDIMScheduler": FastDDIMScheduler},
    "ddpm_fast, fused step": {"DDPMScheduler": FusedDDPMScheduler, "DDIMScheduler": FusedDDIMScheduler},
}


class Replace:
    """A pytest plugin: puts our classes in the place of diffusers', and keeps the outcomes."""

    def __init__(self, classes: dict[str, type]) -> None:
        self.classes = classes
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for name, ours in self.classes.items():
                if hasattr(item.module, name):
                    setattr(item.module, name, ours)
            item.cls.scheduler_classes = tuple(
                self.classes.get(kind.__name__, kind) for kind in item.cls.scheduler_classes
            )

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rsplit("/", 1)[-1]
        if report.failed:
            self.outcomes[name] = "failed"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(name, report.outcome)


def run(folder: Path, name: str) -> dict[str, str]:
    """Outcomes of all tests, by name. A fresh import of the test modules: the classes are replaced in them."""
    for module in [m for m in sys.modules if m.startswith("tests.schedulers")]:
        del sys.modules[module]
    plugin = Replace(RUNS[name])
    files = [str(folder / "tests/schedulers" / file) for file in FILES]
    pytest.main(
        ["-q", "--no-header", "--noconftest", "-p", "no:cacheprovider", f"--rootdir={folder}", *files], plugins=[plugin]
    )
    return plugin.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    folder = parser.parse_args().checkout.resolve()
    folder = folder.parent if folder.name == "tests" else folder
    if not (folder / "tests/schedulers").is_dir():
        sys.exit(f"{folder} holds no tests/schedulers: give a checkout of diffusers")
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    sys.path.insert(0, str(folder))
    outcomes = {name: run(folder, name) for name in RUNS}
    worse = [
        f"{name}: {test}"
        for name, results in outcomes.items()
        for test, outcome in outcomes["diffusers"].items()
        if outcome == "passed" and results.get(test) != "passed"
    ]
    counts = {
        name: {outcome: list(results.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        for name, results in outcomes.items()
    }
    write_result(
        "diffusers_suite",
        {
            "commit": head.stdout.strip() or None,
            "diffusers": diffusers.__version__,
            "files": list(FILES),
            "counts": counts,
            "failed": {name: [t for t, o in results.items() if o == "failed"] for name, results in outcomes.items()},
        },
    )
    for name, count in counts.items():
        print(f"{name:24} {count}")
    if worse or not counts["diffusers"]["passed"]:
        sys.exit("worse than diffusers:\n" + "\n".join(worse))


if __name__ == "__main__":
    main()
