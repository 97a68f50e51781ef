"""Two-sided p-values of the battery's statistics, the lines of its result file, and Bonferroni's verdict."""

import math
from typing import Any

import numpy as np
from scipy import special, stats
from torch import Tensor

LEVEL = 0.001  # of a whole battery


def two_sided(lower: float, upper: float) -> float:
    """Return the two-sided p-value from the probabilities of at most and at least the value; NaN stays NaN."""
    return float(np.minimum(1.0, 2 * np.minimum(lower, upper)))


def p_score(score: float) -> float:
    """Return the p-value of a standard normal score."""
    return float(special.erfc(abs(score) / math.sqrt(2)))


def p_largest(score: float, count: int) -> float:
    """Return the p-value of the largest of `count` independent scores (Sidak)."""
    return float(-np.expm1(count * np.log1p(-min(p_score(score), 1 - 1e-16))))


def p_count(count: float, draws: int, probability: float) -> float:
    """Return the p-value of a binomial count."""
    law = stats.binom(draws, probability)
    return two_sided(law.cdf(count), law.sf(count - 1))


def p_law(law: Any, value: float) -> float:
    """Return the p-value of a value under a continuous law of scipy.stats."""
    return two_sided(law.cdf(value), law.sf(value))


def anderson_darling_sf(a2: float) -> float:
    """Return P(A^2 > a2) for a fully specified law and many draws.

    The series is Anderson & Darling's (1952; Marsaglia & Marsaglia 2004). The integrals of the series are smooth and
    fall off on both sides, so that the trapezoid rule is exact to rounding. Far out the series cancels, and only the
    largest term of A^2 = sum of chi^2_1 / (j (j + 1)) counts.
    """
    if a2 > 20:
        return math.sqrt(3) * math.erfc(math.sqrt(a2))
    if a2 < 0.03:
        return 1.0
    w, spacing = np.linspace(0, 10 * math.sqrt(a2), 2001, retstep=True)
    j = np.arange(40)[:, None]
    t = ((4 * j + 1) * math.pi) ** 2 / (8 * a2)
    values = np.exp(a2 / (8 * (w * w + 1)) - t * (1 + w * w))
    integrals = (values.sum(1) - values[:, 0] / 2) * spacing
    return float(1 - math.sqrt(2 * math.pi) / a2 * (special.binom(-0.5, j) * (4 * j + 1))[:, 0] @ integrals)


def p_anderson_darling(a2: float) -> float:
    upper = anderson_darling_sf(a2)
    return two_sided(1 - upper, upper)


def row(family: str, test: str, statistic: float, p: float, draws: int, **more: Any) -> dict[str, Any]:
    """Return one line of a result file. NaN is rejected here, for all tests: its p is 0."""
    if math.isnan(statistic) or math.isnan(p):
        p = 0.0
    return {"family": family, "test": test, "statistic": float(statistic), "p": p, "draws": draws, **more}


def no_counts(cuts: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Return counts of 0, which `count_beyond` increases and `tail_rows` reads."""
    return {f"{cut:g}": {"below": 0, "above": 0} for cut in cuts}


def count_beyond(z: Tensor, counts: dict[str, dict[str, float]]) -> None:
    """Add the elements of z beyond each cut, on either side; one NaN among them makes every count NaN."""
    extra = math.nan if bool(z.isnan().any()) else 0
    for cut, sides in counts.items():
        sides["below"] += int((z < -float(cut)).sum()) + extra
        sides["above"] += int((z > float(cut)).sum()) + extra


def tail_rows(family: str, counts: dict[str, dict[str, float]], draws: int) -> list[dict[str, Any]]:
    """Return a line below -cut, one above cut and one for both together, for each cut."""
    rows = []
    for cut, sides in counts.items():
        side = float(special.ndtr(-float(cut)))
        for test, count, probability in (
            (f"z < -{cut}", sides["below"], side),
            (f"z > {cut}", sides["above"], side),
            (f"|z| > {cut}", sides["below"] + sides["above"], 2 * side),
        ):
            expected = probability * draws
            score = (count - expected) / math.sqrt(expected)
            p = p_count(count, draws, probability)
            rows.append(row(family, test, score, p, draws, count=count, expected=expected))
    return rows


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Bonferroni's verdict over all p-values of a generator."""
    limit = LEVEL / len(rows)
    smallest = min(rows, key=lambda found: found["p"])
    return {
        "p_values": len(rows),
        "limit": limit,
        "smallest": smallest["p"],
        "smallest_test": f"{smallest['family']}: {smallest['test']}",
        "rejected": smallest["p"] < limit,
        "caught_by": list(dict.fromkeys(found["family"] for found in rows if found["p"] < limit)),
    }
