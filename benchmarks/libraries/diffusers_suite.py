"""Run the scheduler tests of diffusers against its classes and against ours.

    python -m benchmarks.libraries.diffusers_suite CHECKOUT

CHECKOUT is a checkout of diffusers, or a folder that contains its tests/. The tests run three times: with the classes
of diffusers; with our classes, which take diffusers' own step on a CPU; and with our classes where they take the fused
step as on CUDA. The result is written to benchmarks/results/diffusers_suite.json. The command fails if one of our
classes fails a test that the class of diffusers passes.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import write_result
from ddpm_fast.adapters.diffusers import FastDDIMScheduler, FastDDPMScheduler

FILES = ("test_scheduler_ddpm.py", "test_scheduler_ddim.py")


class FusedDDPMScheduler(FastDDPMScheduler):
    """A DDPM scheduler that takes the path of CUDA on a CPU."""

    _backend = "torch"


class FusedDDIMScheduler(FastDDIMScheduler):
    """A DDIM scheduler that takes the path of CUDA on a CPU."""

    _backend = "torch"


RUNS: dict[str, dict[str, type]] = {
    "diffusers": {},
    "ddpm_fast": {"DDPMScheduler": FastDDPMScheduler, "DDIMScheduler": FastDDIMScheduler},
    "ddpm_fast, fused step": {"DDPMScheduler": FusedDDPMScheduler, "DDIMScheduler": FusedDDIMScheduler},
}


class Replace:
    """A pytest plugin that replaces classes of diffusers and collects the outcomes of the tests.

    Attributes:
        classes: The replacements, by the name of the class of diffusers.
        outcomes: "passed", "failed" or "skipped", by the name of the test.
    """

    def __init__(self, classes: dict[str, type]) -> None:
        self.classes = classes
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            for name, ours in self.classes.items():
                if hasattr(item.module, name):
                    setattr(item.module, name, ours)
            item.cls.scheduler_classes = tuple(
                self.classes.get(kind.__name__, kind) for kind in item.cls.scheduler_classes
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rsplit("/", 1)[-1]
        if report.failed:
            self.outcomes[name] = "failed"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(name, report.outcome)


def run(folder: Path, name: str) -> dict[str, str]:
    """Return the outcomes of all tests, by name."""
    for module in [m for m in sys.modules if m.startswith("tests.schedulers")]:  # the last run replaced classes in them
        del sys.modules[module]
    plugin = Replace(RUNS[name])
    files = [str(folder / "tests/schedulers" / file) for file in FILES]
    pytest.main(
        ["-q", "--no-header", "--noconftest", "-p", "no:cacheprovider", f"--rootdir={folder}", *files], plugins=[plugin]
    )
    return plugin.outcomes


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers, or a folder that contains its tests/")
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
