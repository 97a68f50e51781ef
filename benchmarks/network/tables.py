"""The tables about the network and the loop around it, in README.md and docs/network.md."""

from benchmarks.common.pages import markdown_table, with_range
from benchmarks.common.results import read_result


def overhead() -> str:
    """Return the engine's own time on a CPU."""
    lines = [
        f"| {row['batch']} | {row['network_us_per_step']:,.0f} | {row['loop_us_per_step']:,.0f} "
        f"| {row['share']:.1%} | {row['limit']:.0%} |"
        for row in read_result("cpu__overhead")["rows"]
    ]
    return markdown_table("| batch size | network, µs a step | loop, µs a step | loop / network | limit |", lines)


def check() -> str:
    """Return what the comparison of a run with the model costs."""
    lines = [
        f"| {row['steps']} | {row['share']:.2%} ({row['share_lowest']:.2%} to {row['share_highest']:.2%}) "
        f"| {row['limit']:.1%} |"
        for row in read_result("cpu__check")["rows"]
    ]
    return markdown_table("| steps | the comparison / the rest of the run (lowest to highest) | limit |", lines)


def hoisting() -> str:
    """Return the operations that leave the loop of each network, and the time that this saves."""
    lines = [
        f"| {row['network']} | {row['before']} | {row['of_t']} | {row['of_condition']} | {row['of_both']} "
        f"| {row['neutral']} | {row['after']} | {row['tables']}, {row['table_bytes'] / 1e6:.1f} "
        f"| {row['plain_ms']:.1f} | {row['hoisted_ms']:.1f} "
        f"| {with_range(row['speedup'], row['speedup_p20'], row['speedup_p80'])} | {row['build_s']:.1f} "
        f"| {row['largest_difference']:.0e} |"
        for row in read_result("cpu__hoisting")["rows"]
    ]
    header = (
        "| network | operations | depend on t | depend on the condition or on nothing | depend on both | neutral "
        "| left in the loop "
        "| tables: number, MB | plain, ms | hoisted, ms | speed-up (p20 to p80) | time to build, s "
        "| largest difference |"
    )
    return markdown_table(header, lines)


def building() -> str:
    """Return how long a hoisted network takes to build for several batch sizes."""
    lines = [
        f"| {row['network']} | {', '.join(map(str, row['batch_sizes']))} | {row['exports_each']} "
        f"| {row['seconds_each']:.1f} | {row['exports_shared']} | {row['seconds_shared']:.1f} | {row['ratio']:.1f} |"
        for row in read_result("cpu__building")["rows"]
    ]
    header = (
        "| network, on a CPU | batch sizes | traces, one for each size | seconds | traces, shared | seconds | ratio |"
    )
    return markdown_table(header, lines)


def precision() -> str:
    """Return how the network's precision changes the images."""
    lines = [
        f"| {row['network']} | {row['largest']:.1e} | {row['mean']:.1e} | {row['pixels_off_by_one_of_255']:.2%} |"
        for row in read_result("cpu__precision")["rows"]
    ]
    header = (
        "| network | largest difference to float32, on [-1, 1] | mean difference "
        "| pixels that differ by more than 1 of 255 |"
    )
    return markdown_table(header, lines)


def fusion() -> str:
    """Return what fusion leaves of each network, and the predicted time of a call."""
    lines = []
    for row in read_result("cpu__fusion")["rows"]:
        left = ", ".join(f"{count} {name}" for name, count in row["left"].items()) or "nothing"
        lines.append(
            f"| {row['network']} | {row['before']} | {row['after']} | {row['layers']} | {left} "
            f"| {'; '.join(row['reasons']) or '-'} | {row['call_us'] / 1e3:.2f} |"
        )
    header = (
        "| network, batch size 1 | operations on x | fused | of them fused layers | the others "
        "| products left, because | predicted for an H100, bfloat16, ms a call |"
    )
    return markdown_table(header, lines)


TABLES = {"fusion": fusion, "check": check, "hoisting": hoisting, "building": building, "precision": precision}
