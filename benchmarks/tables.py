"""Write the tables of README.md from the files in benchmarks/results.

python benchmarks/tables.py            rewrites what stands between <!-- table NAME --> and <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from ddpm_fast.files import whole_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def quality() -> str:
    """Measured moons against the data."""
    models = _rows("moons__quality")["models"]
    lines = [
        "| model | samples | lit fraction | radius | x | y | misfit, median | misfit > 0.1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        tests = " | ".join(
            f"{model[name]['distance']:.3f} (p = {model[name]['p']:.1g})" for name in ("lit", "radius", "x", "y")
        )
        misfit = model["misfit"]
        steps = model["training"]["steps"]
        lines.append(
            f"| {steps:,} training steps | {model['count']} | {tests} "
            f"| {misfit['median']:.3f} | {misfit['above_0.1']:.1%} |"
        )
    return "\n".join(lines)


def overhead() -> str:
    """The engine's own time on the CPU."""
    lines = ["| batch | network, µs a step | loop, µs a step | loop / network | limit |", "|---|---|---|---|---|"]
    for row in _rows("cpu__overhead"):
        lines.append(
            f"| {row['batch']} | {row['network_us_per_step']:,.0f} | {row['loop_us_per_step']:,.0f} "
            f"| {row['share']:.1%} | {row['limit']:.0%} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"quality": quality, "overhead": overhead}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md must have the table {name!r} once, found it {count} times")
    return text


def _rows(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    text = filled(path.read_text(encoding="utf-8"))
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
