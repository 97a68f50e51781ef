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


def step() -> str:
    """The fused step on the GPU that was measured last, and the same step of others."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*__step.json"))]
    results = [result for result in results if not result.get("smoke")]
    if not results:
        return "Not yet measured on a GPU."
    newest = max(results, key=lambda result: result["environment"]["date"])
    found = newest["environment"]
    lines = [
        f"{found['gpu']}, driver {found['driver']}, torch {found['torch']}, triton {found['triton']}, commit "
        f"{found['commit']}; a copy moves {newest['copy']['GB_per_s']:,.0f} GB/s. Output in bfloat16, clip, noise:",
        "",
        "| state | bytes to move | ddpm_fast, µs | GB/s | of a copy | torch.compile, µs | PyTorch, µs "
        "| diffusers, µs | diffusers / ddpm_fast |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["arm"], *row["shape"]): row for row in newest["rows"] if row["case"] == "bfloat16 output"}
    for row in sorted((row for row in rows.values() if row["arm"] == "ddpm_fast"), key=lambda row: row["state_bytes"]):
        others = [rows.get((arm, *row["shape"])) for arm in ("torch.compile", "torch eager", "diffusers")]
        times = " | ".join(_cell(other, "median_us", ",.1f") for other in others)
        lines.append(
            f"| {'x'.join(map(str, row['shape']))} | {row['traffic_bytes'] / 1e6:,.2f} MB "
            f"| {_cell(row, 'median_us', ',.1f')} | {_cell(row, 'GB_per_s', ',.0f')} "
            f"| {_cell(row, 'share_of_copy', '.1%')} | {times} | {_cell(row, 'ratio_to_diffusers', '.1f')} |"
        )
    return "\n".join(lines)


def _cell(row: dict | None, key: str, form: str) -> str:
    """A number of a row; a dash where it was not measured, and the fact where the result was wrong."""
    if row is not None and "error" in row:
        return "wrong" if row["error"].startswith("wrong result") else "failed"
    value = None if row is None else row.get(key)
    return "-" if value is None else format(value, form)


def counts() -> str:
    """The main step in instructions an element."""
    rows = {(row["name"], row["target"]): row["instructions_per_element"] for row in _rows("sass")}
    lines = [
        "| float32 state, bfloat16 network, sm_90 | x' alone | and the next input | guided | learned variance |",
        "|---|---|---|---|---|",
    ]
    names = ("", "-input", "-guided", "-learned")
    found = [f"{rows[f'step-bf16-clip-philox{name}', 'sm_90']:.1f}" for name in names]
    return "\n".join([*lines, "| instructions an element | " + " | ".join(found) + " |"])


TABLES: dict[str, Callable[[], str]] = {"quality": quality, "overhead": overhead, "counts": counts, "step": step}


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
