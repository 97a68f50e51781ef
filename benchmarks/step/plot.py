"""The plot of a result of `python -m benchmarks.step`: the step's share of a copy's bandwidth."""

from pathlib import Path
from typing import Any

from benchmarks.step.arms import CASES, MAIN
from benchmarks.step.goals import BANDWIDTH_GOAL, CLAIMED
from ddpm_fast.files import whole_file

SHOWN = 64_000_000  # bytes of state, from which on the forms of our step are compared
ARM_COLOURS = {"ddpm_fast": "C0", "torch.compile": "C1", "torch eager": "C2", "diffusers": "C3"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the share of the copy's bandwidth: of every arm over the bytes moved, and of every form of our step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), width_ratios=(1.25, 1), layout="constrained")
    _arms(left, result)
    _forms(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    left.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: size(value)))
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    found = result["environment"]
    gpu = found["gpu"] or found["processor"]
    copied = f"a copy moves {result['copy']['GB_per_s']:,.0f} GB/s"
    figure.suptitle(f"{gpu}: {copied} (torch {found['torch']}, triton {found['triton']})", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    plt.close(figure)


def _arms(axes: Any, result: dict[str, Any]) -> None:
    copy = result["copy"]["GB_per_s"]
    for arm, colour in ARM_COLOURS.items():
        rows = _rows(result, arm, MAIN.name)
        if not rows:
            continue
        xs = [row["traffic_bytes"] for row in rows]
        shares, low, high = zip(*(_shares(row, copy) for row in rows), strict=True)
        width = 2.4 if arm == "ddpm_fast" else 1.5
        axes.plot(xs, shares, "o-", color=colour, label=arm, linewidth=width, markersize=4)
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    graphed = [row for row in _rows(result, "ddpm_fast", MAIN.name) if (row.get("in_graph") or {}).get("cold")]
    if graphed:
        ys = [row["in_graph"]["GB_per_s"] / copy for row in graphed]
        xs = [row["traffic_bytes"] for row in graphed]
        axes.plot(xs, ys, "o:", color="C0", label="ddpm_fast, many in a CUDA graph", markersize=4, markerfacecolor="w")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    reach = axes.get_xlim()
    if reach[0] < CLAIMED:
        axes.axvspan(reach[0], min(CLAIMED, reach[1]), color="0.95", zorder=0, linewidth=0)
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    axes.set_xlim(reach)
    axes.set_title(f"one step, {MAIN.name} (10 bytes an element)", fontsize=11)
    axes.set_xlabel("bytes that the step must move (grey: under 100 MB, not claimed)")
    axes.set_ylabel("share of a copy's bandwidth")
    axes.grid(color="0.85", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.9))


def _forms(axes: Any, result: dict[str, Any]) -> None:
    copy = result["copy"]["GB_per_s"]
    lowest, states = 1.0, set()
    for place, case in enumerate(CASES):
        rows = [row for row in _rows(result, "ddpm_fast", case.name) if row["state_bytes"] >= SHOWN]
        for number, row in enumerate(rows):
            share, low, high = _shares(row, copy)
            lowest = min(lowest, low)
            shift = place + 0.14 * (number - (len(rows) - 1) / 2)
            colour = _blue(row["state_bytes"])
            label = None if row["state_bytes"] in states else f"{size(row['state_bytes'])} of state"
            states.add(row["state_bytes"])
            axes.plot([low, high], [shift, shift], color=colour, linewidth=1.5)
            axes.plot(share, shift, "o", color=colour, markersize=5.5, label=label)
    axes.axvline(1, color="0.4", linewidth=1, linestyle="--")
    axes.axvline(BANDWIDTH_GOAL, color="C3", linewidth=1, label=f"goal, {BANDWIDTH_GOAL:.0%} from 256 MB on")
    axes.set_xlim(min(0.75, lowest - 0.02), 1.05)
    axes.set_ylim(len(CASES) - 0.4, -0.6)
    labels = [f"{case.name}, {case.bytes_per_element()} B" for case in CASES]
    axes.set_yticks(range(len(CASES)), labels)
    axes.set_title("ddpm_fast, by what the step does (bytes an element)", fontsize=11)
    axes.set_xlabel("share of a copy's bandwidth")
    axes.grid(axis="x", color="0.85", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3)


def _rows(result: dict[str, Any], arm: str, case: str) -> list[dict[str, Any]]:
    rows = [row for row in result["rows"] if (row["arm"], row["case"]) == (arm, case) and "median_us" in row]
    return sorted(rows, key=lambda row: row["traffic_bytes"])


def _shares(row: dict[str, Any], copy: float) -> tuple[float, float, float]:
    """Return the share at the median, and at the slow and the fast percentile."""
    median, low, high = (1e-3 * row["traffic_bytes"] / row[key] / copy for key in ("median_us", "p80_us", "p20_us"))
    return median, low, high


def _blue(state_bytes: int) -> tuple[float, float, float]:
    """Return a colour: the larger the state, the darker."""
    depth = min(1.0, max(0.0, (state_bytes.bit_length() - 25) / 7))
    return 0.65 - 0.6 * depth, 0.8 - 0.55 * depth, 0.95 - 0.4 * depth


def size(count: float) -> str:
    """Return bytes as a text with three digits: 64 MiB are 67.1 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:g} B"
