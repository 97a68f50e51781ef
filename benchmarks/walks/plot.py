"""The plot of what `walks.py` measured: milliseconds a step of every arm, a panel a part.

python -m benchmarks.walks.plot      draws docs/walks-<machine>.png from the files in benchmarks/results
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.results import FOLDER, ROOT
from benchmarks.walks.run import PARTS
from ddpm_fast.files import whole_file

RESULTS = FOLDER
OURS_COLOUR, OTHERS_COLOUR, ALONE_COLOUR = "C0", "0.65", "0.85"


def results(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Machine → its results, in the order of the parts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*__walks*.json")):
        machine = path.name.partition("__")[0]
        found.setdefault(machine, []).append(json.loads(path.read_text(encoding="utf-8")))
    order = list(PARTS)
    return {machine: sorted(each, key=lambda result: order.index(result["part"])) for machine, each in found.items()}


def plot(measured: list[dict[str, Any]], path: Path) -> None:
    """Draw bars: medians, with the 20th and 80th percentiles of the walks; errors have no bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(measured))
    lines = -(-len(measured) // columns)
    bars = max(len(result["rows"]) for result in measured)
    size = (8.5 * columns, lines * (0.34 * bars + 1.1))
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, result in zip(panels.flat, measured, strict=False):
        _bars(axes, result)
    for axes in list(panels.flat)[len(measured) :]:
        axes.set_axis_off()
    environment = measured[0]["environment"]
    machine = environment["gpu"] or f"{environment['processor']}, {environment['threads']} threads"
    figure.suptitle(f"{machine} (torch {environment['torch']}): whole walks, milliseconds a step", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def _bars(axes: Any, result: dict[str, Any]) -> None:
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
    """Draw a picture a machine."""
    for machine, measured in results().items():
        path = ROOT / "docs" / f"walks-{machine}.png"
        plot(measured, path)
        print(path)


if __name__ == "__main__":
    main()
