"""The tables of docs/speculation.md, from what `speculation.py` measured."""

from typing import Any

from results import markdown_table, read_result


def _rows() -> list[dict[str, Any]]:
    return read_result("cpu__speculation")["rows"]


def _times(row: dict[str, Any], name: str) -> str:
    found = row[f"faster_than_{name}"]
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def speculation() -> str:
    """Every policy against the sequential sampler."""
    lines = []
    for row in _rows():
        if row["guess"] == "frozen" or (row["policy"] == "sequential" and not row["hoisted"]):
            continue
        policy = row["policy"] + (", hoisted" if row["hoisted"] else "")
        windows = ", ".join(f"{window} from {t}" for t, window in (row.get("windows") or {}).items())
        policy += f" ({windows})" if row["policy"] == "measured" else ""
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


TABLES = {"speculation": speculation, "guesses": guesses, "speculated_moons": speculated_moons}
