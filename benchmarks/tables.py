"""Write the tables of README.md and of the pages in docs/ from the files in benchmarks/results.

    python -m benchmarks.tables      replaces the text between <!-- table NAME --> and <!-- end -->

The rest of a page stays as it is.
"""

from collections.abc import Callable

from benchmarks.common import pages
from benchmarks.common.command_line import make_parser
from benchmarks.common.pages import cell, markdown_table
from benchmarks.common.results import FOLDER, ROOT, Row, read_result
from benchmarks.libraries import tables as libraries
from benchmarks.network import tables as network
from benchmarks.speculation import tables as speculation
from benchmarks.step import tables as step_tables
from benchmarks.study import tables as study
from benchmarks.walks import tables as walks
from benchmarks.walks.arms import COMPILED, OURS, SHIPPED

RESULTS = FOLDER
SHOWN = "nvidia-h100-80gb-hbm3"  # the machine of README.md's first table


def step() -> str:
    """Return the fused step on the GPU that was measured last, beside the same step of other libraries."""
    results = [read_result(path.stem, RESULTS) for path in sorted(RESULTS.glob("*__step.json"))]
    results = [result for result in results if not result.get("smoke")]
    if not results:
        return "Not yet measured on a GPU."
    newest = max(results, key=lambda result: result["environment"]["date"])
    found = newest["environment"]
    heading = (
        f"{found['gpu']}, driver {found['driver']}, torch {found['torch']}, triton {found['triton']}, commit "
        f"{found['commit']}. A copy moves {newest['copy']['GB_per_s']:,.0f} GB/s. The step reads a bfloat16 output, "
        "clips and adds noise:"
    )
    header = (
        "| state | bytes to move | ddpm_fast, µs | GB/s | share of a copy's rate | torch.compile, µs | PyTorch, µs "
        "| diffusers, µs | diffusers / ddpm_fast |"
    )
    rows: dict[tuple[str | int, ...], Row] = {
        (row["arm"], *row["shape"]): row for row in newest["rows"] if row["case"] == "bfloat16 output"
    }
    lines = []
    for row in sorted((row for row in rows.values() if row["arm"] == "ddpm_fast"), key=lambda row: row["state_bytes"]):
        others = [rows.get((arm, *row["shape"])) for arm in ("torch.compile", "torch eager", "diffusers")]
        times = " | ".join(cell(other, "median_us", ",.1f") for other in others)
        lines.append(
            f"| {'x'.join(map(str, row['shape']))} | {row['traffic_bytes'] / 1e6:,.2f} MB "
            f"| {cell(row, 'median_us', ',.1f')} | {cell(row, 'GB_per_s', ',.0f')} "
            f"| {cell(row, 'share_of_copy', '.1%')} | {times} | {cell(row, 'ratio_to_diffusers', '.1f')} |"
        )
    return f"{heading}\n\n{markdown_table(header, lines)}"


def first_look() -> str:
    """Return what a GPU said about the step, about whole runs and about speculation, a row each."""
    step_result, trial = read_result(f"{SHOWN}__step", RESULTS), read_result(f"{SHOWN}__trial", RESULTS)
    large = max(
        (row for row in step_result["rows"] if (row["arm"], row["case"]) == ("ddpm_fast", "bfloat16 output")),
        key=lambda row: row["state_bytes"],
    )
    times = {row["arm"]: row["ms_per_step"] for row in trial["rows"]}
    ours = sorted(times[SHIPPED] / time for arm, time in times.items() if arm.startswith(OURS))
    compiled = min(time for arm, time in times.items() if arm.startswith(COMPILED))
    best = min(time for arm, time in times.items() if arm.startswith(OURS))
    found = trial["speculation"]
    header = f"| on an {trial['environment']['gpu']} | measured |"
    return markdown_table(
        header,
        [
            f"| the fused step, large batches | {large['share_of_copy']:.0%} of a copy's bandwidth; "
            f"{large['ratio_to_diffusers']:.1f} times as fast as diffusers' step |",
            f"| whole runs of a CIFAR-10 U-Net, batch size 1, bfloat16 | {ours[0]:.0f} to {ours[-1]:.0f} times as fast "
            f"as diffusers as shipped; compiled, {compiled / best:.2f} times as fast as diffusers at its best |",
            f"| speculation, the embedded moons, batch size 1 | {found['calls']} sequential calls instead of 1000; "
            f"{found['sequential_ms'] / found['speculative_ms']:.1f} times as fast as our own sequential run |",
        ],
    )


def counts() -> str:
    """Return the instructions per element of the step, in four forms."""
    rows = {(row["name"], row["target"]): row["instructions_per_element"] for row in read_result("sass")["rows"]}
    forms = ("", "-input", "-guided", "-learned")
    numbers = " | ".join(f"{rows[f'step-bf16-clip-philox{form}', 'sm_90']:.1f}" for form in forms)
    header = (
        "| float32 state, bfloat16 network, sm_90 | x' alone | x' and the next denoiser input | guided "
        "| learned variance |"
    )
    return markdown_table(header, [f"| instructions per element | {numbers} |"])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "first_look": first_look,
        "accelerated": libraries.accelerated,
        "quality": study.quality,
        "digits": study.digits,
        "speculated": speculation.speculated,
        "overhead": network.overhead,
        "counts": counts,
        "step": step,
        "walks": walks.parts,
    },
    "docs/benchmarks.md": {"walk_arms": walks.arms, "waiting": walks.waiting},
    "docs/kernels.md": step_tables.TABLES,
    "docs/walk.md": {**study.TABLES, "digits": study.digits},
    "docs/migration.md": libraries.TABLES,
    "docs/speculation.md": speculation.TABLES,
    "docs/network.md": network.TABLES,
}


def tables_of(page: str) -> dict[str, str]:
    """Return the tables of a page by name, made anew."""
    return {name: table() for name, table in PAGES[page].items()}


def main() -> None:
    """Rewrite the pages."""
    make_parser(__doc__).parse_args()
    for page in PAGES:
        pages.fill(ROOT / page, tables_of(page))


if __name__ == "__main__":
    main()
