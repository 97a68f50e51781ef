"""The tables of whole runs, in README.md and docs/benchmarks.md."""

from benchmarks.common.pages import cell, markdown_table, with_range
from benchmarks.common.results import FOLDER, Row, machine_of
from benchmarks.walks.arms import COMPILED, OURS, SHIPPED
from benchmarks.walks.networks import KINDS
from benchmarks.walks.parts import PARTS, TRIALS
from benchmarks.walks.plot import read_results

COLUMNS = {
    "s_per_1000_steps": ".3g", "images_per_s": ".3g", "share_of_ceiling": ".1%", "kernels_per_step": ".0f",
    "host_us_per_step": ",.0f", "memory_MB": ",.0f", "cold_build_s": ".1f", "warm_build_s": ".1f", "gate": ".2f",
}  # fmt: skip


def parts() -> str:
    """Return a row for each part that was measured."""
    lines = []
    results = _by_part()
    for name, part in PARTS.items():
        if name in TRIALS:
            continue
        for result in results.get(name, []):
            rows = {row["arm"]: row for row in result["rows"]}
            timed = [row for row in rows.values() if "ms_per_step" in row]
            compiled, ours = (
                min((row for row in timed if row["arm"].startswith(kind)), key=lambda r: r["ms_per_step"], default=None)
                for kind in (COMPILED, OURS)
            )
            times = [cell(row, "ms_per_step", ",.3g") for row in (rows.get(SHIPPED), compiled, rows.get(OURS), ours)]
            ratios = [_ratio(ours, key) for key in ("over_shipped", "over_best_compiled")]
            tuned = ", max-autotune" if name.endswith("autotune") else ""
            setting = f"{KINDS[part.kind].short} | {part.batch} | {part.precision}{tuned}"
            lines.append(f"| {setting} | {machine_of(result)} | {' | '.join([*times, *ratios])} |")
    header = (
        "| network | batch size | precision | measured on | diffusers as shipped | best compiled | ddpm_fast "
        "| best of ddpm_fast | speed-up over diffusers as shipped | speed-up over best compiled |"
    )
    return markdown_table(header, lines)


def waiting() -> str:
    """Return a sentence that names the parts that were not measured."""
    missing = [name for name in PARTS if name not in (*TRIALS, *_by_part())]
    return f"These parts need a GPU and were not measured yet: {', '.join(missing)}." if missing else ""


def arms() -> str:
    """Return a table of all arms for each part that was measured."""
    header = (
        "| arm | ms a step (p20 to p80) | seconds for 1000 steps | images a second | share of the ceiling "
        "| kernels a step | host, µs a step | memory, MB | cold build, s | warm build, s | gate | speed-up over as "
        "shipped | speed-up over best compiled |"
    )
    pieces = []
    for result in (result for results in _by_part().values() for result in results):
        lines = []
        for row in result["rows"]:
            spread = f" ({row['ms_per_step_p20']:.3g} to {row['ms_per_step_p80']:.3g})" if "ms_per_step" in row else ""
            cells = [f"{cell(row, 'ms_per_step', ',.3g')}{spread}"]
            cells += [cell(row, key, form) for key, form in COLUMNS.items()]
            cells += [_ratio(row, "over_shipped"), _ratio(row, "over_best_compiled")]
            lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
        missing = "".join(f"\n\nLeft out: {each['arm']} ({each['reason']})." for each in result["left_out"])
        pieces.append(f"{_heading(result)}\n\n{markdown_table(header, lines)}{missing}")
    return "\n\n".join(pieces) or "Nothing was measured yet."


def _heading(result: Row) -> str:
    environment = result["environment"]
    length = "1000 steps" if result["steps"] == 1000 else f"{result['steps']} steps, scaled to 1000"
    ceiling = result["ceiling_TFLOP_per_s"]
    matrix = f" A bfloat16 matrix product reaches {ceiling:.0f} TFLOP/s." if ceiling else ""
    many = result.get("built_at_once")
    built = f" {many} arms were built at once." if many else " The arms were built one by one, and ran, in one process."
    return (
        f"**{result['network']}**, batch size {result['batch']}, {result['precision']}, {length}. Measured on "
        f"{machine_of(result)}, with torch {environment['torch']}, at commit {environment['commit']}.{matrix}{built}"
    )


def _by_part() -> dict[str, list[Row]]:
    """Return the results of each part, from all machines."""
    found: dict[str, list[Row]] = {}
    for results in read_results(FOLDER).values():
        for result in results:
            found.setdefault(result["part"], []).append(result)
    return found


def _ratio(row: Row | None, key: str) -> str:
    found = None if row is None else row.get(key)
    return with_range(found["ratio"], found["low"], found["high"]) if found else "-"
