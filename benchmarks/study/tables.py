"""The tables of docs/walk.md, from what `study.py` measured."""

from typing import Any

from benchmarks.common.results import markdown_table as table
from benchmarks.common.results import read_result


def rows_of(part: str) -> list[dict[str, Any]]:
    """What was measured of a part."""
    return read_result(f"moons__{part}")["rows"]


def schedules() -> str:
    """How near every schedule gets to noise."""
    lines = [f"| {r['schedule']} | {r['signal']:.4f} | {r['prior_bits']:.1e} |" for r in rows_of("schedules")]
    return table("| schedule, 1000 steps | √ᾱ_T, what is left of the image | prior, bits per dimension |", lines)


def _quality(row: dict[str, Any]) -> str:
    return (
        f"{row['misfit_median']:.3f} | {row['misfit_above_0.1']:.0%} | {row['lit_distance']:.2f} "
        f"| {row['radius_distance']:.2f} | {row['pixel_deviation']:.2f} |"
    )


_QUALITY = "misfit, median | misfit > 0.1 | lit fraction, KS | radius, KS | deviation of a pixel |"


def temperature() -> str:
    """What becomes of samples when the noise of the steps is scaled."""
    lines = [f"| {row['temperature']:g} | {_quality(row)}" for row in rows_of("temperature")]
    return table(f"| temperature | {_QUALITY}", lines)


def steps() -> str:
    """Quality against the number of steps."""
    lines = [f"| {row['walk']} | {row['steps']} | {_quality(row)}" for row in rows_of("steps")]
    return table(f"| walk | steps | {_QUALITY}", lines)


def fusion() -> str:
    """Lit fractions of the fusions of a full and a half moon."""
    lines = [
        f"| {row['model']} | {row['level']} | {row['lam']} | {row['lit_mean']:.2f} ± {row['lit_deviation']:.2f} "
        f"| {row['gibbous']:.0%} | {row['misfit_median']:.3f} |"
        for row in rows_of("fusion")
    ]
    return table("| denoiser | t | λ | lit fraction, mean ± deviation | gibbous, 0.6 to 0.9 | misfit, median |", lines)


def likelihood() -> str:
    """The bound, and its parts."""
    lines = [
        f"| {row['images']} | {row['total']:.3f} ± {row['standard_error']:.3f} | {row['prior']:.1e} "
        f"| {row['steps']:.3f} | {row['decoder']:.3f} |"
        for row in rows_of("likelihood")
    ]
    return table("| images | bits per dimension, at most | prior | steps | decoder |", lines)


def inpainting() -> str:
    """How often the drawn halves fit the known ones."""
    lines = []
    for row in rows_of("inpainting"):
        jump = row["jump_length"] if row["resamplings"] > 1 else "-"
        lines.append(f"| {row['resamplings']} | {jump} | {row['misfit_median']:.3f} | {row['misfit_above_0.1']:.0%} |")
    return table("| resamplings | jump length | misfit, median | misfit > 0.1 |", lines)


TABLES = {each.__name__: each for each in (schedules, temperature, steps, fusion, likelihood, inpainting)}
