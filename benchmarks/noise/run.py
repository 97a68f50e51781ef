"""The battery: tests with fixed seeds of philox.py's normals, of torch.randn, and of planted bad generators.

    python -m benchmarks.noise [--far-draws 1e11] [--planted NAME]

Every test gives a two-sided p-value; a generator with m of them is rejected when the smallest is below 0.001 / m
(Bonferroni). NaN counts as p = 0. The probabilities of the far tails are also computed exactly, by enumeration of the
words. Writes benchmarks/results/noise__battery.json and the tables of docs/noise.md. With --planted only that planted
generator is run; its report takes the old one's place, with an environment of its own.
"""

import json
import math
import time
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.pages import fill
from benchmarks.common.results import FOLDER, ROOT, environment, write_result, write_rows
from benchmarks.noise.generators import CLAMPED, OURS, PHILOX, PLANTED, RANDN, TORCH, Generator
from benchmarks.noise.p_values import LEVEL, tail_rows, verdict
from benchmarks.noise.statistics import BIG, Sizes, battery
from benchmarks.noise.tails import EXACT_CUTS, exact_tail, far_tails, far_tails_of_randn, lost_cells

PAGE = ROOT / "docs" / "noise.md"
NAME = "noise__battery"


def strict(value: Any) -> Any:
    """Return `value` in strict JSON: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: strict(found) for key, found in value.items()}
    if isinstance(value, list):
        return [strict(found) for found in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(generator: Generator, sizes: Sizes, far: dict[str, Any] | None) -> dict[str, Any]:
    """Run the battery on one generator and return its report with the verdict."""
    started = time.perf_counter()
    rows = battery(generator, sizes) + (tail_rows("far tails", far["counts"], far["draws"]) if far else [])
    seconds = round(time.perf_counter() - started, 1)
    report = {"name": generator.name, "verdict": verdict(rows), "seconds": seconds, "far": far, "tests": rows}
    if generator.caught_by:
        report["planted_for"] = generator.caught_by
    show(report)
    result: dict[str, Any] = strict(report)
    return result


def measure_planted(bad: Generator) -> dict[str, Any]:
    return measure(bad, BIG, far_tails(bad.uniforms, 10**10) if bad.uniforms else None)


def show(report: dict[str, Any]) -> None:
    """Print one battery."""
    print(f"\n{report['name']} ({report['seconds']} s)")
    if report["far"]:
        print(f"  far tails: {', '.join(f'{key} {value}' for key, value in report['far'].items() if key != 'counts')}")
    for found in report["tests"]:
        counted = f"{found['count']} for {found['expected']:.4g}" if "count" in found else f"{found['statistic']:.5g}"
        bad = "  REJECTED" if found["p"] < report["verdict"]["limit"] else ""
        print(f"  {found['family']:<20} {found['test']:<32} {counted:<24} p = {found['p']:.3g}{bad}")
    print(f"  {report['verdict']}", flush=True)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of docs/noise.md."""
    return {
        "battery": _battery_table(result),
        "far": _far_table(result),
        "exact": _exact_table(result),
        "planted": _planted_table(result),
    }


def _p(p: float) -> str:
    return "< 1e-300" if p < 1e-300 else f"{p:.2g}"


def _count(count: int | None) -> str:
    return "NaN" if count is None else f"{count:,}"


def _battery_table(result: dict[str, Any]) -> str:
    reports = [result["ddpm_fast"], result["torch.randn"]]
    lines = ["| tests | draws | p-values | ddpm_fast, smallest p | torch.randn, smallest p |", "|---|---|---|---|---|"]
    for family in dict.fromkeys(found["family"] for found in reports[0]["tests"]):
        groups = [[found for found in report["tests"] if found["family"] == family] for report in reports]
        smallest = [_p(min(found["p"] for found in group)) for group in groups]
        draws = f"{groups[0][0]['draws']:.2g}".replace("e+", "e").replace("e0", "e")
        lines.append(f"| {family} | {draws} | {len(groups[0])} | {smallest[0]} | {smallest[1]} |")
    verdicts = ["rejected" if report["verdict"]["rejected"] else "not rejected" for report in reports]
    found = reports[0]["verdict"]
    lines.append(
        f"| **all**, limit {found['limit']:.2g} | | {found['p_values']} | **{verdicts[0]}** | **{verdicts[1]}** |"
    )
    return "\n".join(lines)


def _far_table(result: dict[str, Any]) -> str:
    lines = [
        "| generator | draws | cut | z < -cut | z > cut | both | expected | p, both | seconds | draws a second |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in (result["ddpm_fast"], result["torch.randn"], *result["planted"]):
        if report["far"] is None:
            continue
        found = [row for row in report["tests"] if row["family"] in ("tails at 4 and 5", "far tails")]
        for below, above, both in zip(found[::3], found[1::3], found[2::3], strict=True):
            counts = " | ".join(_count(line["count"]) for line in (below, above, both))
            far = report["far"] if both["family"] == "far tails" else None
            rate = f"{far['seconds']:,.0f} | {far['draws_per_second']:.1e}" if far else "| "
            cells = [report["name"], f"{both['draws']:,}", above["test"][4:], counts, f"{both['expected']:,.1f}"]
            lines.append("| " + " | ".join([*cells, _p(both["p"]), rate]) + " |")
    return "\n".join(lines)


def _exact_table(result: dict[str, Any]) -> str:
    lines = [
        "| cut | radius words | P(\\|z\\| > cut) | N(0, 1) | ratio | lost, first cell | lost, last cell "
        "| torch.randn: ratio | 23 bits: ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ours, randn, clamped in zip(*result["exact"].values(), strict=True):
        lines.append(
            f"| {ours['cut']:g} | {ours['radius_words']:,} | {ours['probability']:.6g} | {ours['normal']:.6g} "
            f"| {ours['ratio']:.6f} | {ours['lost_in_first_cell']:.1e} | {ours['lost_in_last_cell']:.1e} "
            f"| {randn['ratio']:.4f} | {clamped['ratio']:.4f} |"
        )
    return "\n".join(lines)


def _planted_table(result: dict[str, Any]) -> str:
    lines = ["| planted | rejected | smallest p | caught by |", "|---|---|---|---|"]
    for report in result["planted"]:
        found = report["verdict"]
        rejected = "yes" if found["rejected"] else "**no**"
        lines.append(f"| {report['name']} | {rejected} | {_p(found['smallest'])} | {', '.join(found['caught_by'])} |")
    return "\n".join(lines)


def _no_constant(name: str) -> None:
    raise ValueError(f"{NAME}.json has {name}, which is not JSON")


def committed_file() -> dict[str, Any]:
    """Return the result file, which must be strict JSON."""
    result: dict[str, Any] = json.loads(
        (FOLDER / f"{NAME}.json").read_text(encoding="utf-8"), parse_constant=_no_constant
    )
    return result


def committed() -> dict[str, Any]:
    """Return the rows of the result file."""
    rows: dict[str, Any] = committed_file()["rows"]
    return rows


def replace_planted(name: str) -> None:
    """Run one planted generator anew; everything else in the result file stays."""
    (bad,) = (bad for bad in PLANTED if bad.name == name)
    whole = json.loads((FOLDER / f"{NAME}.json").read_text(encoding="utf-8"))  # what is replaced need not be strict
    planted = whole["rows"]["planted"]
    (at,) = (i for i, report in enumerate(planted) if report["name"] == name)
    planted[at] = measure_planted(bad) | {"environment": environment()}
    json.dumps(whole, allow_nan=False)  # raises, before the file is touched
    write_rows(FOLDER / f"{NAME}.json", whole)


def write_page() -> None:
    """Put the numbers of the result file into docs/noise.md."""
    fill(PAGE, tables(committed()))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--far-draws", type=float, default=1e10, help="of ours; the others' are 1e10")
    parser.add_argument("--planted", metavar="NAME", choices=[bad.name for bad in PLANTED], help="run only this one")
    arguments = parser.parse_args()
    if arguments.planted:
        replace_planted(arguments.planted)
        write_page()
        return 0
    exact = {
        name: [exact_tail(cut, uniforms) for cut in EXACT_CUTS]
        for name, uniforms in (("ddpm_fast", OURS), ("torch.randn", TORCH), ("clamped", CLAMPED))
    }
    for found in exact["ddpm_fast"]:
        found |= lost_cells(found["cut"])
    result: dict[str, Any] = {"level": LEVEL, "exact": exact}
    result["ddpm_fast"] = measure(PHILOX, BIG, far_tails(OURS, int(arguments.far_draws)))
    result["torch.randn"] = measure(RANDN, BIG, far_tails_of_randn(10**10))
    result["planted"] = [measure_planted(bad) for bad in PLANTED]
    json.dumps(result, allow_nan=False)  # raises, before the file is touched
    write_result(NAME, result)
    write_page()
    return 0
