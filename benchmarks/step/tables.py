"""The tables about the host's share of a step, in docs/kernels.md."""

from benchmarks.common.pages import markdown_table
from benchmarks.common.results import read_result


def host() -> str:
    """Return the host's time of a launch and of the public step."""
    lines = [
        f"| {row['arm']} | {row['us']:.1f} | {row['over_empty']:.2f} |" for row in read_result("cpu__host")["launches"]
    ]
    return markdown_table("| what the host does above the driver | µs | times an empty kernel |", lines)


def schedulers() -> str:
    """Return the host's time of scheduler.step, diffusers' own and accelerated."""
    lines = [
        f"| {row['scheduler']} | {row['diffusers']:.0f} | {row['accelerated']:.0f} | {row['ratio']:.2f} |"
        for row in read_result("cpu__host")["rows"]
    ]
    return markdown_table(
        "| scheduler | diffusers, µs a step | accelerated, µs a step | diffusers / accelerated |", lines
    )


TABLES = {"host": host, "schedulers": schedulers}
