"""The step from x_t to x_{t-1}: any row of any sampler's table, in one pass over memory."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_disjoint,
    check_seeds,
    check_tensor,
    check_writable,
    span,
)
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.rows import COLUMNS, Rows, halves, rows_on_host, split_output
from ddpm_fast.kernels.step_options import StepOptions, list_options, with_defaults

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["COLUMNS", "StepOptions", "implementation", "rows_on_host", "step", "step_torch"]


_WRITTEN = ("x_new", "x0_new", "model_input", "timestep")
_READ = ("seeds", "z", "bound", "guidance", "known", "mask")
_OPTIONAL = (*_WRITTEN, *_READ)
_X_NEW = 5  # its place among all tensors: behind x, output, coefficients, ids and base
_PLACES_WRITTEN = range(_X_NEW, _X_NEW + len(_WRITTEN))
MOST_FORMS = 256
_CHECKED: dict[Any, list[int]] = {}  # forms of arguments that were checked, with the bytes that each tensor spans


@list_options
@torch.no_grad()
def step(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int = 0,
    *,
    backend: str | None = None,
    **options: "Unpack[StepOptions]",
) -> Tensor:
    """Take one step of every sample, each in its own row base[i] + offset of the table, and return x_{t-1}.

        out  = output                        or, guided, uncond + guidance (cond - uncond)
        x0   = a x + b out                   clipped to [-clip, clip], or to [-bound, bound] and divided by bound
        x'   = c_x0 x0 + c_x x + c_out out + sigma z
        x'   = mask k + (1 - mask) x'        with k = known_scale known + known_sigma z_k, if an image is known

    With `learned`, sigma is multiplied by exp(log_variance / 2), log_variance = f log_max + (1 - f) log_min and
    f = (v + 1) / 2 for v in the second half of the output's channels (Nichol & Dhariwal 2021, eq. 15). A sample
    whose row lies outside the table is left as it is.

    Args:
        x: The states, float32 [B, C, ...], contiguous.
        output: The network's output, any float dtype, [B, C, ...] in any strides; with `guidance` [2B, ...]. The output
            may have 2C channels; the second half is read only with `learned`.
        coefficients: The table, float32 [S, 10], the columns of `COLUMNS`.
        ids: Timestep and noise id of every row, int32 [S, 2].
        base: Row of every sample, int32 [B].
        offset: Number that is added to `base`.
        backend: "triton" or "torch"; None chooses by device.
        options: What else the step reads and writes; see `StepOptions`.

    Raises:
        TypeError: An option has an unknown name.
        ValueError: A tensor has the wrong shape, dtype, device or layout; a tensor that is written overlaps another
            (x_new and x excepted, as a whole); options contradict one another.
    """
    given = with_defaults(options)
    tensors = (x, output, coefficients, ids, base, *[getattr(given, name) for name in _OPTIONAL])
    form = _form(tensors, given)
    sizes = _CHECKED.get(form)
    if sizes is None or _overlap(tensors, sizes):
        _check(x, output, coefficients, ids, base, given)
        if len(_CHECKED) >= MOST_FORMS:
            _CHECKED.clear()
        _CHECKED[form] = [0 if tensor is None else span(tensor)[1] - span(tensor)[0] for tensor in tensors]
    if given.x_new is None:
        given.x_new = x.clone()
    for name in ("seeds", "bound", "guidance"):
        if (value := getattr(given, name)) is not None:
            setattr(given, name, value.contiguous())
    launch = implementation(choose_backend(x.device, backend))
    with on_device(x.device):
        return launch(x, output, coefficients.contiguous(), ids.contiguous(), base.contiguous(), offset, **vars(given))


@list_options
def step_torch(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor | list[list[Any]],
    ids: Tensor | list[list[int]],
    base: Tensor | int,
    offset: int = 0,
    **options: "Unpack[StepOptions]",
) -> Tensor:
    """Take the step on PyTorch: the twin of `step`, with x_new given.

    The twin computes in the dtype of x, float64 included (with coefficients in that dtype). With an int as `base` all
    samples are in that row, which must be inside the table. That takes a third of the operations, and fewer still where
    coefficients and ids are those of `rows_on_host`.
    """
    given = with_defaults(options)
    row = Rows(coefficients, base, offset, x.dim())
    out, variance = split_output(x, output, given.guidance)
    x0 = row.predict_x0(x, out, row.target(given.x0_new))
    if given.bound is not None:
        limit = row.per_sample(given.bound.to(x.dtype))
        x0 = x0.clamp_(-limit, limit).div_(limit)
    elif given.clip is not None:
        x0.clamp_(-given.clip, given.clip)
    new = row.scaled(x, row.c_x, row.target(given.x_new))
    row.add(new, row.c_x0, x0)
    if given.use_output:
        row.add(new, row.c_out, out)
    z = given.z
    if z is None and given.seeds is not None:
        z = row.noise(given.seeds, ids, philox.Stream.STEP, x)
    if z is not None:
        if given.learned:
            assert variance is not None
            share = variance.add(1).mul_(0.5)
            deviation = share.mul_(row.log_max - row.log_min).add_(row.log_min).mul_(0.5).exp_().mul_(row.sigma)
            new.add_(row.where_noisy(deviation).mul_(z))
        else:
            row.add(new, row.sigma, z)
    if given.known is not None:
        noised = row.scaled(given.known, row.known_scale)
        row.add(noised, row.known_sigma, row.noise(given.seeds, ids, philox.Stream.INPAINT, x))
        keep = given.mask.to(x.dtype)
        new.mul_(1 - keep).add_(noised.mul_(keep))

    x_new: Tensor = given.x_new
    row.write(x_new, new)
    if given.x0_new is not None:
        row.write(given.x0_new, x0)
    if given.model_input is not None:
        for half in halves(given.model_input, x.shape[0]):
            row.write(half, x_new)
    if given.timestep is not None:
        for half in halves(given.timestep, x.shape[0]):
            row.write_next_timestep(half, ids)
    return x_new


def _form(tensors: tuple[Any, ...], given: Any) -> tuple[Any, ...] | None:
    """Return all that `_check` looks at but the places in memory, or None for arguments that are no tensors."""
    try:
        kinds = [t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.is_neg()) for t in tensors]
    except (AttributeError, RuntimeError):
        return None
    return *kinds, given.clip, given.learned, given.use_output


def _overlap(tensors: tuple[Any, ...], sizes: list[int]) -> bool:
    """Return whether a tensor that is written may share memory with another; x_new may be x as a whole."""
    begins = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    for place in _PLACES_WRITTEN:
        begin = begins[place]
        if begin is None:
            continue
        end = begin + sizes[place]
        for other, at in enumerate(begins):
            if at is None or other == place or (place == _X_NEW and other == 0 and at == begin):
                continue
            if at < end and begin < at + sizes[other]:
                return True
    return False


@functools.cache
def implementation(backend: str) -> Callable[..., Tensor]:
    """Return the unchecked function behind `step`: for callers whose buffers cannot change, x_new always given."""
    if backend == "torch":
        return step_torch
    from ddpm_fast.kernels.step_triton import step_triton

    return step_triton


def _check(x: Tensor, output: Tensor, coefficients: Tensor, ids: Tensor, base: Tensor, given: Any) -> None:
    shape, device = tuple(x.shape), x.device
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a non-empty [B, C, ...] tensor, got shape {shape}")
    check_tensor("x", x, shape, (torch.float32,), device)
    check_contiguous("x", x)
    batch, channels = shape[:2]
    halves = 1 if given.guidance is None else 2
    widths = (2 * channels,) if given.learned else (channels, 2 * channels)
    width = output.shape[1] if output.dim() > 1 and output.shape[1] in widths else widths[0]
    check_tensor("output", output, (halves * batch, width, *shape[2:]), FLOATS, device)
    if len(coefficients) == 0:
        raise ValueError("coefficients must have at least one row")
    check_tensor("coefficients", coefficients, (len(coefficients), len(COLUMNS)), (torch.float32,), device)
    check_tensor("ids", ids, (len(coefficients), 2), (torch.int32,), device)
    check_tensor("base", base, (batch,), (torch.int32,), device)
    if given.seeds is not None:
        check_seeds(given.seeds, batch, device)
    for name in ("bound", "guidance"):
        if (tensor := getattr(given, name)) is not None:
            check_tensor(name, tensor, (batch,), (torch.float32,), device)
    for name in ("z", "known", "x_new", "x0_new"):
        if (tensor := getattr(given, name)) is not None:
            check_tensor(name, tensor, shape, (torch.float32,), device)
            check_contiguous(name, tensor)
    if given.mask is not None:
        check_tensor("mask", given.mask, shape, (torch.float32, torch.bool), device)
        check_contiguous("mask", given.mask)
    if given.model_input is not None:
        check_tensor("model_input", given.model_input, (halves * batch, *shape[1:]), FLOATS, device)
        check_writable("model_input", given.model_input)
    if given.timestep is not None:
        check_tensor("timestep", given.timestep, (halves * batch,), (torch.int64,), device)
        check_contiguous("timestep", given.timestep)
    _check_options(given)
    check_disjoint(
        {name: getattr(given, name) for name in _WRITTEN},
        {"x": x, "output": output, "coefficients": coefficients, "ids": ids, "base": base}
        | {name: getattr(given, name) for name in _READ},
        in_place=("x_new", "x"),
    )  # fmt: skip


def _check_options(given: Any) -> None:
    """Raise ValueError for options that contradict one another."""
    if given.clip is not None and not given.clip >= 0:
        raise ValueError(f"clip must be >= 0, got {given.clip}")
    if given.clip is not None and given.bound is not None:
        raise ValueError("x0 is limited by clip or by bound, not by both")
    if (given.known is None) != (given.mask is None):
        raise ValueError("known and mask belong together: give both or neither")
    if given.known is not None and given.seeds is None:
        raise ValueError("known needs seeds: it is noised to the level of the step")
    if given.known is None and given.seeds is not None and given.z is not None:
        raise ValueError("noise comes from seeds or from z, not from both")
