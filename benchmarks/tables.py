"""Write the tables of README.md and of pages in docs/ from the files in benchmarks/results.

python -m benchmarks.tables            rewrites what stands between <!-- table NAME --> and <!-- end -->
"""

import json
import re
from collections.abc import Callable

from benchmarks.common.results import FOLDER, ROOT, machine_of, markdown_table, read_result
from benchmarks.speculation import tables as speculation_tables
from benchmarks.study import tables as moon_tables
from ddpm_fast.files import whole_file

RESULTS = FOLDER


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


def accelerated() -> str:
    """The originals' loops and the accelerated ones, shortly."""
    result = read_result("cpu__adapters")
    operations = {(row["library"], row["walk"]): row for row in result["counts"]}
    ends = _whole_calls(result)
    header = (
        "| | steps | sampler, µs a step: theirs | ours | ratio | limit | with a small U-Net, all | and hoisted "
        "| operations a step |"
    )
    lines = []
    for row in result["rows"]:
        if row["network"] != "light" or row["batch"] != 1:
            continue
        key = row["library"], row["walk"]
        counted = operations[key]
        lines.append(
            f"| {row['library']}, {row['walk']} | {row['steps']} | {row['theirs_us']:.0f} | {row['ours_us']:.0f} "
            f"| {row['ratio']:.2f} | {row['limit']} | {ends[key]['end_to_end_ratio']:.2f} "
            f"| {ends[key]['hoisted_end_to_end_ratio']:.2f} "
            f"| {counted['theirs_operations']:.0f} → {counted['ours_operations']:.0f} |"
        )
    return markdown_table(header, lines)


def adapters() -> str:
    """The same with everything that was measured."""
    result = read_result("cpu__adapters")
    ends = _whole_calls(result)
    header = (
        "| | batch | steps | sampler, µs a step: theirs | ours | ratio (of 7 rounds) | `randn`, µs | end to end "
        "| and hoisted | largest difference |"
    )
    lines = []
    for row in result["rows"]:
        if row["network"] != "light":
            continue
        end = ends[row["library"], row["walk"]] if row["batch"] == 1 else None
        whole = f"{end['end_to_end_ratio']:.3f} ({end['control_ratio']:.3f})" if end else "-"
        hoisted = f"{end['hoisted_end_to_end_ratio']:.3f}" if end else "-"
        lines.append(
            f"| {row['library']}, {row['walk']} | {row['batch']} | {row['steps']} | {row['theirs_us']:.0f} "
            f"| {row['ours_us']:.0f} | {row['ratio']:.2f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}) "
            f"| {result['randn_us'][str(row['batch'])]:.0f} | {whole} | {hoisted} "
            f"| {row['largest_difference']:.0e} |"
        )
    return markdown_table(header, lines)


def _whole_calls(result: dict) -> dict[tuple[str, str], dict]:
    """The rows with a U-Net, by library and walk."""
    return {(row["library"], row["walk"]): row for row in result["rows"] if row["network"] == "real"}


def operations() -> str:
    """What torch dispatches for a step."""
    header = "| | operations: theirs | ours | kernels of theirs on a GPU | waits of theirs |"
    lines = []
    for row in read_result("cpu__adapters")["counts"]:
        lines.append(
            f"| {row['library']}, {row['walk']} | {row['theirs_operations']:.0f} | {row['ours_operations']:.1f} "
            f"| {row['theirs_kernels']:.0f} | {row['theirs_waits']:.0f} |"
        )
    return markdown_table(header, lines)


def hoisting() -> str:
    """What leaves the networks, and what that saves."""
    header = (
        "| network | operations | of t | of the condition or nothing | of both | neutral | left | tables, MB "
        "| plain, ms | hoisted, ms | speed-up (p20 to p80) | built in, s | largest difference |"
    )
    lines = []
    for row in _rows("cpu__hoisting"):
        lines.append(
            f"| {row['network']} | {row['before']} | {row['of_t']} | {row['of_condition']} | {row['of_both']} "
            f"| {row['neutral']} | {row['after']} | {row['tables']}, {row['table_bytes'] / 1e6:.1f} "
            f"| {row['plain_ms']:.1f} | {row['hoisted_ms']:.1f} "
            f"| {row['speedup']:.2f} ({row['speedup_p20']:.2f} to {row['speedup_p80']:.2f}) | {row['build_s']:.1f} "
            f"| {row['largest_difference']:.0e} |"
        )
    return markdown_table(header, lines)


def precision() -> str:
    """What the network's precision does to the images."""
    header = "| network | largest difference to float32, on [-1, 1] | mean | pixels off by more than 1 of 255 |"
    lines = []
    for row in _rows("cpu__precision"):
        lines.append(
            f"| {row['network']} | {row['largest']:.1e} | {row['mean']:.1e} | {row['pixels_off_by_one_of_255']:.2%} |"
        )
    return markdown_table(header, lines)


def walks() -> str:
    """Whole walks, a row a part; what was not measured says so."""
    from benchmarks.walks.networks import KINDS
    from benchmarks.walks.run import COMPILED, OURS, PARTS, SHIPPED

    header = (
        "| network | batch | precision | measured on | diffusers as shipped | best compiled | ddpm_fast "
        "| best of ddpm_fast | over diffusers as shipped | over best compiled |"
    )
    lines, missing = [], []
    found = _walks()
    for name, part in PARTS.items():
        if name == "smoke":
            continue
        tuned = ", max-autotune" if name.endswith("autotune") else ""
        title = f"| {KINDS[part.kind].short} | {part.batch} | {part.precision}{tuned} "
        if name not in found:
            missing.append(name)
        for result in found.get(name, []):
            rows = {row["arm"]: row for row in result["rows"]}
            timed = [row for row in rows.values() if "ms_per_step" in row]
            compiled, ours = (
                min((row for row in timed if row["arm"].startswith(kind)), key=lambda r: r["ms_per_step"], default=None)
                for kind in (COMPILED, OURS)
            )
            shown = [rows.get(SHIPPED), compiled, rows.get(OURS), ours]
            cells = [_cell(row, "ms_per_step", ",.3g") for row in shown]
            ratios = [_ratio(ours, key) for key in ("over_shipped", "over_best_compiled")]
            lines.append(f"{title}| {machine_of(result)} | " + " | ".join([*cells, *ratios]) + " |")
    waiting = f"\n\nNot yet measured, each for want of a GPU: {', '.join(missing)}." if missing else ""
    return markdown_table(header, lines) + waiting


def walk_arms() -> str:
    """Every arm of every part that was measured."""
    pieces = []
    for results in _walks().values():
        for result in results:
            scaled = "end to end" if result["steps"] == 1000 else f"{result['steps']} steps, scaled"
            heading = (
                f"**{result['network']}**, batch {result['batch']}, {result['precision']}; {machine_of(result)}, torch "
                f"{result['environment']['torch']}, commit {result['environment']['commit']}; {scaled}"
            )
            if result["ceiling_TFLOP_per_s"]:
                heading += f"; bfloat16 matrix ceiling {result['ceiling_TFLOP_per_s']:.0f} TFLOP/s"
            header = (
                "| arm | ms a step (p20 to p80) | s for 1000 steps | images a second | of the ceiling | kernels a step "
                "| host, µs a step | memory, MB | built in, s | gate | over as shipped | over best compiled |"
            )
            lines = []
            for row in result["rows"]:
                spread = (
                    f" ({row['ms_per_step_p20']:.3g} to {row['ms_per_step_p80']:.3g})" if "ms_per_step" in row else ""
                )
                cells = " | ".join(_cell(row, key, form) for key, form in _WALK_COLUMNS.items())
                lines.append(
                    f"| {row['arm']} | {_cell(row, 'ms_per_step', ',.3g')}{spread} | {cells} "
                    f"| {_ratio(row, 'over_shipped')} | {_ratio(row, 'over_best_compiled')} |"
                )
            missing = "".join(f"\n\nLeft out: {each['arm']} ({each['reason']})." for each in result["left_out"])
            pieces.append(f"{heading}:\n\n{markdown_table(header, lines)}{missing}")
    return "\n\n".join(pieces) or "Nothing was measured yet."


_WALK_COLUMNS = {
    "s_per_1000_steps": ".3g", "images_per_s": ".3g", "share_of_ceiling": ".1%", "kernels_per_step": ".0f",
    "host_us_per_step": ",.0f", "memory_MB": ",.0f", "build_s": ".1f", "gate": ".2f",
}  # fmt: skip


def _walks() -> dict[str, list[dict]]:
    """Part → its results, of all machines."""
    from benchmarks.walks.plot import results

    found: dict[str, list[dict]] = {}
    for each in results(RESULTS).values():
        for result in each:
            found.setdefault(result["part"], []).append(result)
    return found


def _ratio(row: dict | None, key: str) -> str:
    found = None if row is None else row.get(key)
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "-"


def bfloat16() -> str:
    """How far half precision is from float32."""
    found = read_result("cpu__adapters")["bfloat16_difference"]
    return (
        "| 1000 steps, a small U-Net with random weights | diffusers | accelerated |\n|---|---|---|\n"
        f"| network in bfloat16, largest difference to float32 | {found['theirs']:.3f} | {found['ours']:.3f} |"
    )


def digits() -> str:
    """Digits drawn by the embedded model: legible, various, and none that it has seen."""
    lines = []
    for row in _rows("digits__quality"):
        guidance = row["guidance"]
        name = "no class" if guidance is None else "guidance 1, the model's law" if guidance == 1 else f"{guidance:g}"
        name = "the data, each among the others" if row["digits"] == "data" else name
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        lines.append(
            f"| {name} | {row['count']} | {accuracy} | {row['diversity']:.0%} | {row['to_seen_median']:.3f} "
            f"| {row['to_unseen_median']:.3f} | {row['to_seen_smallest']:.3f} "
            f"| {row['nearer_to_seen']:.0%} ± {row['nearer_to_seen_error']:.0%} |"
        )
    return markdown_table(
        "| digits | count | read as asked for | spread within a class | to the nearest seen one "
        "| to the nearest unseen one | to a seen one, smallest | nearer to a seen one |",
        lines,
    )


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "accelerated": accelerated,
        "quality": quality,
        "digits": digits,
        "speculated": speculation_tables.speculated,
        "overhead": overhead,
        "counts": counts,
        "step": step,
        "walks": walks,
    },
    "docs/benchmarks.md": {"walk_arms": walk_arms},
    "docs/walk.md": {**moon_tables.TABLES, "digits": digits},
    "docs/migration.md": {"bfloat16": bfloat16, "adapters": adapters, "operations": operations},
    "docs/speculation.md": speculation_tables.TABLES,
    "docs/network.md": {"hoisting": hoisting, "precision": precision},
}


def filled(page: str) -> str:
    """The page's text with every marked table made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page} must have the table {name!r} once, found it {count} times")
    return text


def _rows(name: str):
    return read_result(name)["rows"]


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        text = filled(page)
        with whole_file(ROOT / page) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
