"""The tables about speculative sampling, in README.md and docs/speculation.md."""

from collections.abc import Callable
from functools import partial

from benchmarks.common.pages import markdown_table, with_range
from benchmarks.common.results import FOLDER, RESEARCH, Row, machine_of, read_result

OWN = "of the row, each step"  # the guess and the rule of ddpm_fast


def speculation(name: str = "cpu__speculation") -> str:
    """Return the policies of a result file against the sequential sampler."""
    lines = []
    for row in _rows(name):
        if row["guess"] == "frozen" or (row["policy"] == "sequential" and not row["hoisted"]):
            continue
        policy = row["policy"] + (", hoisted" if row["hoisted"] else "")
        windows = ", ".join(f"{window} from {t}" for t, window in (row.get("windows") or {}).items())
        policy += f" ({windows})" if row["policy"].startswith("measured") else ""
        counts = _counts(row) if "calls" in row else "- | 1.00 | -"
        faster = f"{_faster(row, 'plain')} | {_faster(row, 'hoisted')}"
        lines.append(f"| {row['model']} | {row['batch']} | {policy} | {counts} | {faster} |")
    header = (
        "| model | batch size | windows | calls | volume | rejections | speed-up over plain sequential "
        "| speed-up over hoisted sequential |"
    )
    return markdown_table(header, lines)


def guesses() -> str:
    """Return the guess of the row against the frozen guess."""
    rows = _rows("cpu__speculation_calls")
    lines = []
    for frozen in (row for row in rows if row["guess"] == "frozen"):
        (own,) = (r for r in rows if r["guess"] != "frozen" and all(r[k] == frozen[k] for k in ("model", "windows")))
        lines.append(f"| {frozen['model']} | {frozen['windows']} | {_counts(frozen)} | {_counts(own)} |")
    columns = " | ".join(
        f"{guess}: {count}" for guess in ("frozen", "of the row") for count in ("calls", "volume", "rejections")
    )
    return markdown_table(f"| model | windows | {columns} |", lines)


def ideas() -> str:
    """Return the ideas that were not adopted, with the calls that each needs."""
    rows = read_result("cpu__speculation_ideas", RESEARCH)["rows"]
    widths = sorted({row["width"] for row in rows})
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["width"]: row["calls"] for row in rows if row["model"] == model and row["idea"] == OWN}
        for idea in dict.fromkeys(row["idea"] for row in rows):
            cells, shares = [], []
            for width in widths:
                (row,) = (r for r in rows if (r["model"], r["idea"], r["width"]) == (model, idea, width))
                more = "" if idea == OWN else f" ({row['calls'] / own[width] - 1:+.0%})"
                cells.append(f"{row['calls']:.1f}{more} | {row['rejections']:.0f}")
                shares.append(row["rounds_ended_by_the_likeliest_row"])
            name = f"**{idea}**" if idea == OWN else idea
            lines.append(f"| {model} | {name} | {' | '.join(cells)} | {max(shares):.0%} |")
    columns = " | ".join(f"window {width}: calls | window {width}: rejections" for width in widths)
    header = f"| model | guess, rule | {columns} | largest share of rounds that end at the same step of the window |"
    return markdown_table(header, lines)


def replay() -> str:
    """Return the time of a call by batch size, in calls with one sample."""
    lines = []
    for path in sorted(FOLDER.glob("*__replay.json")):
        result = read_result(path.stem)
        rows = result["rows"]
        batches = sorted({row["batch"] for row in rows})
        for network in dict.fromkeys(row["network"] for row in rows):
            own = {row["batch"]: row for row in rows if row["network"] == network}
            cells = " | ".join(f"{own[batch]['single_calls']:.2f}" for batch in batches if batch > 1)
            lines.append(f"| {machine_of(result)} | {network} | {own[1]['ms']:.2f} ms | {cells} |")
    header = " | ".join(f"{batch} samples" for batch in batches if batch > 1)
    return markdown_table(f"| machine | network | one sample | {header} |", lines)


def speculated() -> str:
    """Return the short summary of `speculate=True`."""
    lines = [
        f"| {row['model']} | {row['batch']} | {row['calls']:.0f} instead of 1000 | {row['volume']:.2f} "
        f"| {_faster(row, 'plain')} |"
        for row in _rows("cpu__speculation")
        if row["policy"] == "measured" and not row["hoisted"]
    ]
    return markdown_table("| model, on a CPU | batch size | sequential network calls | volume | speed-up |", lines)


def speculated_moons() -> str:
    """Return the tests of speculated moons against sequential moons."""
    tests = read_result("moons__speculated")["rows"]["tests"]
    lines = [f"| {name} | {test['distance']:.3f} | {test['p']:.2f} |" for name, test in tests.items()]
    return markdown_table("| statistic | distance | p |", lines)


def _rows(name: str) -> list[Row]:
    rows: list[Row] = read_result(name)["rows"]
    return rows


def _counts(row: Row) -> str:
    return f"{row['calls']:.0f} | {row['volume']:.2f} | {row['rejections']:.0f}"


def _faster(row: Row, name: str) -> str:
    found = row[f"faster_than_{name}"]
    return with_range(found["median"], found["low"], found["high"])


TABLES: dict[str, Callable[[], str]] = {
    "speculation": speculation, "guesses": guesses, "speculated_moons": speculated_moons, "ideas": ideas,
    "replay": replay, "every": partial(speculation, "cpu__speculation_every"),
}  # fmt: skip
