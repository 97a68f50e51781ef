"""The tables about moons and digits, in README.md and docs/walk.md."""

from benchmarks.common.pages import markdown_table
from benchmarks.common.results import Row, read_result

MISFIT = "median misfit | misfit > 0.1"
QUALITY = f"{MISFIT} | lit fraction, KS distance | radius, KS distance | deviation of a pixel |"


def rows_of(part: str) -> list[Row]:
    """Return the rows that were measured for a part of the study."""
    rows: list[Row] = read_result(f"moons__{part}")["rows"]
    return rows


def quality() -> str:
    """Return the tests of measured moons against the data."""
    lines = []
    for model in read_result("moons__quality")["rows"]["models"]:
        tests = " | ".join(
            f"{model[name]['distance']:.3f} (p = {model[name]['p']:.1g})" for name in ("lit", "radius", "x", "y")
        )
        misfit = model["misfit"]
        lines.append(
            f"| {model['training']['steps']:,} training steps | {model['count']} | {tests} "
            f"| {misfit['median']:.3f} | {misfit['above_0.1']:.1%} |"
        )
    return markdown_table(f"| model | samples | lit fraction | radius | x | y | {MISFIT} |", lines)


def digits() -> str:
    """Return the digits of the embedded model: legibility, variety, and distance to the digits of the training."""
    lines = []
    for row in read_result("digits__quality")["rows"]:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        lines.append(
            f"| {_digits_name(row)} | {row['count']} | {accuracy} | {row['diversity']:.0%} "
            f"| {row['to_seen_median']:.3f} | {row['to_unseen_median']:.3f} | {row['to_seen_smallest']:.3f} "
            f"| {row['nearer_to_seen']:.0%} ± {row['nearer_to_seen_error']:.0%} |"
        )
    header = (
        "| digits | count | read as the class asked for | spread within a class | median distance to the nearest seen "
        "digit | median distance to the nearest unseen digit | smallest distance to a seen digit "
        "| share nearer to a seen digit |"
    )
    return markdown_table(header, lines)


def _digits_name(row: Row) -> str:
    if row["digits"] == "data":
        return "the data, each digit against the others"
    if row["guidance"] is None:
        return "samples without a class"
    note = " (the model's law)" if row["guidance"] == 1 else ""
    return f"samples, guidance {row['guidance']:g}{note}"


def schedules() -> str:
    """Return how near every schedule gets to noise."""
    lines = [f"| {r['schedule']} | {r['signal']:.4f} | {r['prior_bits']:.1e} |" for r in rows_of("schedules")]
    return markdown_table(
        "| schedule, 1000 steps | √ᾱ_T, the part of the image that is left | prior, bits per dimension |", lines
    )


def temperature() -> str:
    """Return the quality of samples whose steps have scaled noise."""
    lines = [f"| {row['temperature']:g} | {_quality(row)} |" for row in rows_of("temperature")]
    return markdown_table(f"| temperature | {QUALITY}", lines)


def steps() -> str:
    """Return the quality of samples by the number of steps."""
    lines = [f"| {row['walk']} | {row['steps']} | {_quality(row)} |" for row in rows_of("steps")]
    return markdown_table(f"| sampler | steps | {QUALITY}", lines)


def fusion() -> str:
    """Return the lit fractions of the fusions of a full moon and a half moon."""
    lines = [
        f"| {row['model']} | {row['level']} | {row['lam']} | {row['lit_mean']:.2f} ± {row['lit_deviation']:.2f} "
        f"| {row['gibbous']:.0%} | {row['misfit_median']:.3f} |"
        for row in rows_of("fusion")
    ]
    header = "| denoiser | t | λ | lit fraction, mean ± deviation | gibbous, 0.6 to 0.9 | median misfit |"
    return markdown_table(header, lines)


def likelihood() -> str:
    """Return the bound of the likelihood and its parts."""
    lines = [
        f"| {row['images']} | {row['total']:.3f} ± {row['standard_error']:.3f} | {row['prior']:.1e} "
        f"| {row['steps']:.3f} | {row['decoder']:.3f} |"
        for row in rows_of("likelihood")
    ]
    return markdown_table("| images | bits per dimension, at most | prior | steps | decoder |", lines)


def inpainting() -> str:
    """Return how often the drawn halves fit the known halves."""
    lines = []
    for row in rows_of("inpainting"):
        jump = row["jump_length"] if row["resamplings"] > 1 else "-"
        lines.append(f"| {row['resamplings']} | {jump} | {row['misfit_median']:.3f} | {row['misfit_above_0.1']:.0%} |")
    return markdown_table(f"| resamplings | jump length | {MISFIT} |", lines)


def _quality(row: Row) -> str:
    return (
        f"{row['misfit_median']:.3f} | {row['misfit_above_0.1']:.0%} | {row['lit_distance']:.2f} "
        f"| {row['radius_distance']:.2f} | {row['pixel_deviation']:.2f}"
    )


TABLES = {
    "schedules": schedules, "temperature": temperature, "steps": steps, "fusion": fusion, "likelihood": likelihood,
    "inpainting": inpainting,
}  # fmt: skip
