"""The plot of whole runs: milliseconds a step of every arm, one panel for each part.

    python -m benchmarks.walks.plot      draws docs/walks-<machine>.png

The numbers come from the files in benchmarks/results.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import FOLDER, ROOT, Row
from benchmarks.walks.parts import PARTS
from ddpm_fast.files import whole_file

OURS_COLOUR, OTHERS_COLOUR, ALONE_COLOUR = "C0", "0.65", "0.85"


def read_results(folder: Path = FOLDER) -> dict[str, list[Row]]:
    """Return the results of each machine, in the order of the parts."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*__walks*.json")):
        machine = path.name.partition("__")[0]
        found.setdefault(machine, []).append(json.loads(path.read_text(encoding="utf-8")))
    order = list(PARTS)
    return {machine: sorted(each, key=lambda result: order.index(result["part"])) for machine, each in found.items()}


def plot(results: list[Row], path: Path) -> None:
    """Draw a bar for each median, with the 20th and 80th percentiles of the runs. Arms with an error have no bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(results))
    lines = -(-len(results) // columns)
    bars = max(len(result["rows"]) for result in results)
    size = (8.5 * columns, lines * (0.34 * bars + 1.1))
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, result in zip(panels.flat, results, strict=False):
        _draw_bars(axes, result)
    for axes in list(panels.flat)[len(results) :]:
        axes.set_axis_off()
    environment = results[0]["environment"]
    machine = environment["gpu"] or f"{environment['processor']}, {environment['threads']} threads"
    figure.suptitle(f"{machine} (torch {environment['torch']}): whole runs, milliseconds a step", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def _draw_bars(axes: Any, result: Row) -> None:
    rows = sorted((row for row in result["rows"] if "ms_per_step" in row), key=lambda row: -row["ms_per_step"])
    longest = max(row["ms_per_step"] for row in rows)
    for place, row in enumerate(rows):
        arm, median = row["arm"], row["ms_per_step"]
        colour = OURS_COLOUR if arm.startswith("ddpm_fast") else ALONE_COLOUR if "alone" in arm else OTHERS_COLOUR
        spread = [[max(0, median - row["ms_per_step_p20"])], [max(0, row["ms_per_step_p80"] - median)]]
        axes.barh(place, median, xerr=spread, color=colour, ecolor="0.3", capsize=2)
        over = row.get("over_shipped")
        text = f"{median:.3g}" + (f"  ({over['ratio']:.2f} x as shipped)" if over else "")
        axes.text(row["ms_per_step_p80"] + 0.015 * longest, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_title(f"{result['network']}, batch {result['batch']}, {result['precision']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw a picture for each machine."""
    make_parser(__doc__).parse_args()
    for machine, results in read_results().items():
        path = ROOT / "docs" / f"walks-{machine}.png"
        plot(results, path)
        print(path)


if __name__ == "__main__":
    main()
