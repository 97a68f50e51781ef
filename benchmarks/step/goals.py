"""The goals of the fused step on a GPU. A goal that is missed is not loosened."""

from typing import Any

from benchmarks.step.arms import CASES, FLOAT32, MAIN

LARGE = 256_000_000  # bytes of state, from which on the goals of bandwidth hold
CLAIMED = 100_000_000  # bytes of traffic; below, cache and launch count as much as memory
BANDWIDTH_GOAL, DIFFUSERS_GOAL, LAUNCH_GOAL = 0.92, 7.0, 0.20


def goals(rows: list[dict[str, Any]], launch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every goal with its worst value and whether the goal was met; None where nothing was measured."""
    large = [row for row in rows if row["arm"] == "ddpm_fast" and row["state_bytes"] >= LARGE]
    found = []
    for case in CASES:
        own = [row for row in large if row["case"] == case.name]
        shares = [row.get("share_of_copy") for row in own]
        found.append(_goal(f"share of copy bandwidth, {case.name}", "at least", BANDWIDTH_GOAL, shares))
    for case in (MAIN, FLOAT32):
        ratios = [row.get("ratio_to_diffusers") for row in large if row["case"] == case.name]
        found.append(_goal(f"times as fast as diffusers, {case.name}", "at least", DIFFUSERS_GOAL, ratios))
    for name in ("implementation", "step"):
        over = [launch.get("host", {}).get(name, {}).get("over_empty")]
        found.append(_goal(f"host time over an empty kernel's, {name}", "at most", LAUNCH_GOAL, over))
    return found


def _goal(name: str, sense: str, limit: float, values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    at_least = sense == "at least"
    worst = (min(known) if at_least else max(known)) if known else None
    met = None if worst is None else worst >= limit if at_least else worst <= limit
    return {"goal": name, "limit": f"{sense} {limit:g}", "value": worst, "sizes": len(known), "met": met}
