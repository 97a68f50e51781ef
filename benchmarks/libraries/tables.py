"""The tables that compare other libraries with their accelerated objects, in README.md and docs/migration.md."""

from benchmarks.common.pages import markdown_table, with_range
from benchmarks.common.results import Row, read_result

RESULT = "cpu__adapters"


def accelerated() -> str:
    """Return the short comparison, at batch size 1."""
    result = read_result(RESULT)
    operations = {_key(row): row for row in result["counts"]}
    calls = _whole_calls(result)
    lines = []
    for row in result["rows"]:
        if row["network"] != "light" or row["batch"] != 1:
            continue
        counted, call = operations[_key(row)], calls[_key(row)]
        lines.append(
            f"| {_name(row)} | {row['steps']} | {row['theirs_us']:.0f} | {row['ours_us']:.0f} | {row['ratio']:.2f} "
            f"| {row['limit']} | {call['end_to_end_ratio']:.2f} | {call['hoisted_end_to_end_ratio']:.2f} "
            f"| {counted['theirs_operations']:.0f} → {counted['ours_operations']:.0f} |"
        )
    header = (
        "| library and call | steps | original sampler, µs a step | accelerated sampler, µs a step | ratio "
        "| limit of the ratio | ratio of whole calls with a small U-Net | the same ratio, hoisted | operations a step |"
    )
    return markdown_table(header, lines)


def adapters() -> str:
    """Return the long comparison."""
    result = read_result(RESULT)
    calls = _whole_calls(result)
    lines = []
    for row in result["rows"]:
        if row["network"] != "light":
            continue
        call = calls[_key(row)] if row["batch"] == 1 else None
        whole = f"{call['end_to_end_ratio']:.3f} ({call['control_ratio']:.3f})" if call else "-"
        hoisted = f"{call['hoisted_end_to_end_ratio']:.3f}" if call else "-"
        ratio = with_range(row["ratio"], row["ratio_lowest"], row["ratio_highest"])
        lines.append(
            f"| {_name(row)} | {row['batch']} | {row['steps']} | {row['theirs_us']:.0f} | {row['ours_us']:.0f} "
            f"| {ratio} | {result['randn_us'][str(row['batch'])]:.0f} | {whole} | {hoisted} "
            f"| {row['largest_difference']:.0e} |"
        )
    header = (
        "| library and call | batch size | steps | original sampler, µs a step | accelerated sampler, µs a step "
        "| ratio (lowest and highest of 7 rounds) | `randn`, µs | end to end | end to end, hoisted "
        "| largest difference |"
    )
    return markdown_table(header, lines)


def operations() -> str:
    """Return what torch dispatches for one step."""
    lines = [
        f"| {_name(row)} | {row['theirs_operations']:.0f} | {row['ours_operations']:.1f} "
        f"| {row['theirs_kernels']:.0f} | {row['theirs_waits']:.0f} |"
        for row in read_result(RESULT)["counts"]
    ]
    header = (
        "| library and call | operations of the original | accelerated operations | kernels of the original on a GPU "
        "| waits of the original on a GPU |"
    )
    return markdown_table(header, lines)


def bfloat16() -> str:
    """Return how far the images of half precision are from the images of float32."""
    difference = read_result(RESULT)["bfloat16_difference"]
    return markdown_table(
        "| 1000 steps, a small U-Net with random weights | diffusers | accelerated |",
        [
            f"| network in bfloat16, largest difference to float32 | {difference['theirs']:.3f} "
            f"| {difference['ours']:.3f} |"
        ],
    )


def _whole_calls(result: Row) -> dict[tuple[str, str], Row]:
    """Return the rows that were measured with a U-Net."""
    return {_key(row): row for row in result["rows"] if row["network"] == "real"}


def _key(row: Row) -> tuple[str, str]:
    return row["library"], row["walk"]


def _name(row: Row) -> str:
    return f"{row['library']}, {row['walk']}"


TABLES = {"bfloat16": bfloat16, "adapters": adapters, "operations": operations}
