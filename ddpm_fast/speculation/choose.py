"""The loop that `speculate` asks for: plain or speculative, with a plan that is given or chosen by measurement."""

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm as std_tqdm

from ddpm_fast.engine import choices
from ddpm_fast.engine.base import SamplingLoop
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import DEFAULT, Execution
from ddpm_fast.engine.graph import GraphPool
from ddpm_fast.engine.loop import Correction, Loop
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.engine.progress import make_bar
from ddpm_fast.speculation.loop import SpeculativeLoop, check_table
from ddpm_fast.speculation.windows import MIN_SPEEDUP, WIDTHS, GuessErrors, WindowPlan, choose_windows
from ddpm_fast.table import Clipping, StepTable

logger = logging.getLogger("ddpm_fast")

Speculate = bool | int | Mapping[int, int] | WindowPlan

FEW = 64  # drafts in a call: every width up to FEW is timed, and wider calls as long as the cost of a draft
STILL_FALLS = 0.95  # falls to this share or below with every doubling
RESERVED = 2**64 - 1  # seed of the pilot: nobody's image decides about the windows that draw it
PILOT = 16  # window of the run that measures the quality of guesses
LONGEST = 2.0  # plain runs that choosing may take
# The chosen plan of every network, by all that the measurement depended on.
_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], WindowPlan]] = weakref.WeakKeyDictionary()


def check_speculate(speculate: Any) -> None:
    """Raise ValueError or TypeError unless `speculate` is False, True, or a plan."""
    if not isinstance(speculate, bool):
        WindowPlan.of(speculate)


def build_loop(
    speculate: Speculate,
    call: Call,
    table: StepTable,
    clipping: Clipping,
    *,
    correction: Correction | None = None,
    keep_x0: bool = False,
    inference_mode: bool = False,
    execution: Execution = DEFAULT,
    pool: GraphPool | None = None,
) -> tuple[SamplingLoop, WindowPlan | None]:
    """Build the loop that `speculate` asks for.

    Args:
        speculate: See `Sampler`. True measures the network.
        call, table, clipping, correction, keep_x0, inference_mode, execution, pool: See `Loop`.

    Returns:
        The loop, which is plain where no step is drafted ahead; and the plan, None if `speculate` is False.

    Raises:
        ValueError: The table or the options do not allow speculation.
    """
    plan = None
    if speculate is not False:
        if correction is not None or keep_x0:
            raise ValueError("speculate does not go with cond_fn or self-conditioning, which follow every step")
        plan = _plan(speculate, call, table, clipping, inference_mode, execution)
    if plan is not None and not plan.sequential:
        loop = SpeculativeLoop(call, table, clipping, plan, inference_mode=inference_mode, execution=execution)
        return loop, plan
    plain = Loop(
        call, table, clipping, correction=correction, keep_x0=keep_x0, inference_mode=inference_mode,
        execution=execution, pool=pool,
    )  # fmt: skip
    return plain, plan


def _plan(
    speculate: Speculate, call: Call, table: StepTable, clipping: Clipping, inference_mode: bool, execution: Execution
) -> WindowPlan:
    """Return the plan that `speculate` gives, or the plan that measurements choose if `speculate` is True."""
    plan = None if speculate is True else WindowPlan.of(speculate)
    if plan is None or not plan.sequential:
        check_table(table)
    if not np.any(table.sigma):
        return WindowPlan.of(1)  # every step is a plain one, so that all other drafts of a window are in vain
    if plan is not None:
        return plan

    # Preparing a network takes long: the measurements do without, so that there is nothing to verify.
    unprepared = replace(execution, optimize=None, memory_format=None, compile=False, verify=False)
    plans = _PLANS.setdefault(call.module, {}) if isinstance(call.module, nn.Module) else {}
    rows = table.coefficients().numpy().tobytes(), table.timestep.tobytes()
    key = (call.shape, rows, clipping, call.dtype, call.device, call.guided, execution, torch.get_num_threads())
    if key not in plans:
        lasting = choices.key_of(call, key)
        found = choices.recall("windows", lasting, WindowPlan.of)
        if found is None:

            def loop(call: Call, window: int) -> SpeculativeLoop:
                plan = WindowPlan.of(window)
                return SpeculativeLoop(call, table, clipping, plan, inference_mode=inference_mode, execution=unprepared)

            found = _measured_plan(
                lambda width: loop(call, width).seconds(width), loop(call.first(), PILOT), call.batch
            )
            about = f"windows of {type(call.module).__name__} for shape {call.shape}"
            choices.remember("windows", lasting, found.to_dict(), about)
        plans[key] = found
    return plans[key]


def _measured_plan(seconds_of: Callable[[int], float], pilot: SpeculativeLoop, batch: int) -> WindowPlan:
    """Return the plan for the cost of rounds of each width, and for the quality of guesses in a run of `pilot`.

    Both measurements together take about two plain runs at the most.
    """
    began, steps = time.perf_counter(), len(pilot.table)
    with make_bar(total=steps, unit="step", desc="choosing windows", disable=None, leave=False) as bar:
        costs = _round_costs(seconds_of, batch, steps, bar)
        deadline = began + LONGEST * steps * costs[1]
        if all(costs[width] * MIN_SPEEDUP > width * costs[1] for width in costs if width > 1):
            plan = WindowPlan.of(1)  # however good the guesses are
        else:
            plan = choose_windows(pilot.table, _guess_errors(pilot, max(costs), deadline, bar), costs)
    durations = ", ".join(f"{1e3 * each:.3g} ms for {width}" for width, each in costs.items())
    logger.info("speculate: windows %s for a batch of %d; rounds take %s", plan.to_dict(), batch, durations)
    return plan


def _guess_errors(pilot: SpeculativeLoop, reach: int, deadline: float, bar: std_tqdm) -> NDArray[np.float64]:
    """Return |D|^2 of every step and lag in a run of `pilot`; infinity for steps after the deadline."""
    errors, steps = GuessErrors(pilot.table, reach), len(pilot.table)
    pilot.watch = errors.add
    noise = PhiloxNoise([RESERVED], pilot.shape, pilot.table, pilot.device, pilot.backend)
    for reached in pilot.steps(noise, progress=bar):
        if reached < steps and time.perf_counter() > deadline:
            logger.info("speculate: the guesses are measured for %d of %d steps; time is up", reached, steps)
            break  # steps without a measurement are not drafted
    return errors.squares


def _round_costs(seconds_of: Callable[[int], float], batch: int, steps: int, bar: std_tqdm) -> dict[int, float]:
    """Return the seconds of a round of each width, as far as wider rounds may pay and fit into memory and time."""
    costs: dict[int, float] = {}
    began = last = time.perf_counter()
    for width in WIDTHS:
        now = time.perf_counter()
        if width > 2 and now - began + 2 * (now - last) > steps * costs[1]:
            break  # the next width takes about twice as long, and the pilot's run needs its time
        last = now
        bar.set_postfix_str(f"timing calls with {width} drafts")
        narrower = [costs[each] / each for each in (width // 2, width // 4) if each in costs]
        if batch * width > FEW and len(narrower) == 2 and narrower[0] > STILL_FALLS * narrower[1]:
            break  # a draft costs no less in wider calls
        try:
            costs[width] = seconds_of(width)
        except torch.OutOfMemoryError:
            break
    bar.set_postfix_str("measuring guesses")
    return costs
