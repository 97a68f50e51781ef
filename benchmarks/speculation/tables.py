"""The tables of docs/speculation.md, from what `speculation.py` measured."""

from functools import partial
from typing import Any

from benchmarks.common.results import FOLDER, RESEARCH, machine_of, markdown_table, read_result

OWN = "of the row, each step"  # what ddpm_fast does


def _rows(name: str = "cpu__speculation") -> list[dict[str, Any]]:
    return read_result(name)["rows"]


def _times(row: dict[str, Any], name: str) -> str:
    found = row[f"faster_than_{name}"]
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def speculation(name: str = "cpu__speculation") -> str:
    """The policies of a result against the sequential sampler."""
    lines = []
    for row in _rows(name):
        if row["guess"] == "frozen" or (row["policy"] == "sequential" and not row["hoisted"]):
            continue
        policy = row["policy"] + (", hoisted" if row["hoisted"] else "")
        windows = ", ".join(f"{window} from {t}" for t, window in (row.get("windows") or {}).items())
        policy += f" ({windows})" if row["policy"].startswith("measured") else ""
        counts = "- | 1.00 | - "
        if "calls" in row:
            counts = f"{row['calls']:.0f} | {row['volume']:.2f} | {row['rejections']:.0f} "
        faster = f"{_times(row, 'plain')} | {_times(row, 'hoisted')}"
        lines.append(f"| {row['model']} | {row['batch']} | {policy} | {counts}| {faster} |")
    header = (
        "| model | batch | windows | calls | volume | rejections | over plain sequential | over hoisted sequential |"
    )
    return markdown_table(header, lines)


def guesses() -> str:
    """The guess of the row against the frozen one."""
    lines = []
    rows = read_result("cpu__speculation_calls")["rows"]
    for frozen in (row for row in rows if row["guess"] == "frozen"):
        (own,) = (r for r in rows if r["guess"] != "frozen" and all(r[k] == frozen[k] for k in ("model", "windows")))
        cells = " | ".join(
            f"{row['calls']:.0f} | {row['volume']:.2f} | {row['rejections']:.0f}" for row in (frozen, own)
        )
        lines.append(f"| {frozen['model']} | {frozen['windows']} | {cells} |")
    header = "| model | windows | frozen: calls | volume | rejections | of the row: calls | volume | rejections |"
    return markdown_table(header, lines)


def ideas() -> str:
    """What else was tried, and what it saves."""
    rows = read_result("cpu__speculation_ideas", RESEARCH)["rows"]
    widths = sorted({row["width"] for row in rows})
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["width"]: row["calls"] for row in rows if row["model"] == model and row["idea"] == OWN}
        for idea in dict.fromkeys(row["idea"] for row in rows):
            cells, ends = [], []
            for width in widths:
                (row,) = (r for r in rows if (r["model"], r["idea"], r["width"]) == (model, idea, width))
                more = "" if idea == OWN else f" ({row['calls'] / own[width] - 1:+.0%})"
                cells.append(f"{row['calls']:.1f}{more} | {row['rejections']:.0f}")
                ends.append(row["rounds_ended_by_the_likeliest_row"])
            name = f"**{idea}**" if idea == OWN else idea
            lines.append(f"| {model} | {name} | {' | '.join(cells)} | {max(ends):.0%} |")
    columns = " | ".join(f"window {width}: calls | rejections" for width in widths)
    return markdown_table(
        f"| model | guess, rule | {columns} | rounds that one step of the window ends, at most |", lines
    )


def replay() -> str:
    """What a call costs by batch size, in calls of one."""
    lines = []
    for path in sorted(FOLDER.glob("*__replay.json")):
        found = read_result(path.stem)
        rows = found["rows"]
        batches = sorted({row["batch"] for row in rows})
        for network in dict.fromkeys(row["network"] for row in rows):
            own = {row["batch"]: row for row in rows if row["network"] == network}
            cells = " | ".join(f"{own[batch]['single_calls']:.2f}" for batch in batches if batch > 1)
            lines.append(f"| {machine_of(found)} | {network} | {own[1]['ms']:.2f} ms | {cells} |")
    header = " | ".join(str(batch) for batch in batches if batch > 1)
    return markdown_table(f"| machine | network | a call of one | {header} |", lines)


def speculated() -> str:
    """What `speculate=True` brings, in short."""
    lines = [
        f"| {row['model']} | {row['batch']} | {row['calls']:.0f} instead of 1000 | {row['volume']:.2f} "
        f"| {_times(row, 'hoisted' if row['hoisted'] else 'plain')} |"
        for row in _rows()
        if row["policy"] == "measured" and not row["hoisted"]
    ]
    return markdown_table("| model, on a CPU | batch | calls | volume | times faster |", lines)


def speculated_moons() -> str:
    """Speculated moons against sequential ones."""
    found = read_result("moons__speculated")["rows"]["tests"]
    lines = [f"| {name} | {test['distance']:.3f} | {test['p']:.2f} |" for name, test in found.items()]
    return markdown_table("| | distance | p |", lines)


TABLES = {
    "speculation": speculation, "guesses": guesses, "speculated_moons": speculated_moons, "ideas": ideas,
    "replay": replay, "every": partial(speculation, "cpu__speculation_every"),
}  # fmt: skip
