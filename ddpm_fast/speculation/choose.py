"""What `speculate` asks for: windows that are given or chosen by measurement, and the loop that walks with them."""

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.speculation.loop import SpeculativeLoop, check_table
from ddpm_fast.speculation.windows import PAYS, WIDTHS, GuessErrors, Windows, choose_windows
from ddpm_fast.table import StepTable

logger = logging.getLogger("ddpm_fast")

Speculate = bool | int | Mapping[int, int] | Windows

FEW = 64  # drafts in a call: up to so many every width is timed, and more as long as the cost of a draft
STILL_FALLS = 0.95  # falls to this share or below with every doubling
PILOT = 16  # drafts at once of the walk that measures how good guesses are
# What was measured, for a network and all that it was measured with.
_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Windows]] = weakref.WeakKeyDictionary()


def check_speculate(speculate: Any) -> None:
    """Raise ValueError or TypeError unless `speculate` is False, True, or names windows."""
    if not isinstance(speculate, bool):
        Windows.of(speculate)


def speculative_loop(
    speculate: Speculate,
    model: Model,
    shape: tuple[int, ...],
    *,
    table: StepTable,
    how: Execution,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | None,
    guidance: Tensor | None,
    **fixed: Any,
) -> tuple[Windows | None, SpeculativeLoop | None]:
    """What `speculate` asks for: the windows, None if it is False; and the loop, None where no step is drafted ahead.

    Args:
        speculate: see `Sampler`.
        model, shape, table, how, model_kwargs, uncond_kwargs, guidance, fixed: those of `SpeculativeLoop`.
    """
    make: Callable[..., SpeculativeLoop] = partial(SpeculativeLoop, model, table=table, **fixed)
    given: dict[str, Any] = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs, "guidance": guidance}
    windows = _resolved(speculate, make, table, shape, given, how)
    if windows is None or windows.sequential:
        return windows, None
    return windows, make(shape, windows=windows, how=how, **given)


def _resolved(
    speculate: Speculate, make: Callable[..., SpeculativeLoop], table: StepTable, shape: tuple[int, ...],
    given: Mapping[str, Any], how: Execution,
) -> Windows | None:  # fmt: skip
    """The windows that `speculate` names; chosen by measurement if it is True; None if it is False.

    Args:
        speculate: see `Sampler`.
        make: a `SpeculativeLoop` of everything but shape, given and how.
        table: the rows to walk.
        shape: of the batch.
        given: model_kwargs, uncond_kwargs and guidance, for the batch.
        how: the walk is executed.
    """
    if speculate is False:
        return None
    windows = None if speculate is True else Windows.of(speculate)
    if windows is None or not windows.sequential:
        check_table(table)
    if not np.any(table.sigma):
        return Windows.of(1)  # every step is a plain one, the rest of its window computed in vain
    if windows is not None:
        return windows
    one = make((1, *shape[1:]), windows=Windows.of(PILOT), how=replace(_plainly(how), execution="eager"), **{
        name: _first(value, shape[0]) for name, value in given.items()
    })  # fmt: skip
    network = one.model if one.module is None else one.module
    known = _CHOSEN.setdefault(network, {}) if isinstance(network, nn.Module) else {}
    rows = table.coefficients().numpy().tobytes(), table.timestep.tobytes()
    key = (shape, rows, one.clipping, one.dtype, one.device, one.guided, how, torch.get_num_threads())
    if key not in known:
        known[key] = _measured_windows(
            lambda width: make(shape, windows=Windows.of(width), how=_plainly(how), **given).seconds(width),
            one,
            shape[0],
        )
    return known[key]


def _plainly(how: Execution) -> Execution:
    """Without what takes long to prepare."""
    return replace(how, optimize=None, memory_format=None, compile=False)


def _measured_windows(seconds_of: Callable[[int], float], pilot: SpeculativeLoop, batch: int) -> Windows:
    """Windows for what rounds of each width cost, and how good guesses are in a walk of `pilot`, one sample."""
    costs = _round_costs(seconds_of, batch)
    if all(costs[width] * PAYS > width * costs[1] for width in costs if width > 1):
        windows = Windows.of(1)  # however good guesses are
    else:
        errors = GuessErrors(pilot.table, max(costs))
        pilot.watch = errors.add
        bar = tqdm(total=len(pilot.table), unit="step", desc="choosing windows", disable=None, leave=False)
        pilot.run(PhiloxNoise([0], pilot.shape, pilot.table, pilot.device, pilot.backend), progress=bar)
        windows = choose_windows(pilot.table, errors.squares, costs)
    took = ", ".join(f"{1e3 * each:.3g} ms for {width}" for width, each in costs.items())
    logger.info("speculate: windows %s for a batch of %d; rounds take %s", windows.to_dict(), batch, took)
    return windows


def _round_costs(seconds_of: Callable[[int], float], batch: int) -> dict[int, float]:
    """Seconds of a round of each width, as far as wider ones may pay and fit into memory."""
    costs: dict[int, float] = {}
    for width in WIDTHS:
        narrower = [costs[each] / each for each in (width // 2, width // 4) if each in costs]
        if batch * width > FEW and len(narrower) == 2 and narrower[0] > STILL_FALLS * narrower[1]:
            break  # a draft costs no less in wider calls
        try:
            costs[width] = seconds_of(width)
        except torch.OutOfMemoryError:
            break
    return costs


def _first(value: Any, batch: int) -> Any:
    """What is given for the first sample of the batch."""
    if isinstance(value, Mapping):
        return {name: _first(each, batch) for name, each in value.items()}
    return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value
