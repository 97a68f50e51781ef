"""The step from x_t to x_{t-1}: any row of any sampler's table, in one pass over memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_disjoint,
    check_seeds,
    check_tensor,
    check_visit,
    check_writable,
)
from ddpm_fast.kernels.dispatch import choose_backend, on_device

COLUMNS = (
    "a", "b", "c_x0", "c_x", "c_out", "sigma", "log_min", "log_max", "known_scale", "known_sigma", "input_scale",
)  # fmt: skip


@torch.no_grad()
def step(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int = 0,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    conditional_first: bool = True,
    learned: bool = False,
    use_output: bool = True,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    x_new: Tensor | None = None,
    x0_new: Tensor | None = None,
    model_input: Tensor | None = None,
    scale_input: bool = False,
    timestep: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one step of every sample, each in its own row base[i] + offset of the table, and return x_{t-1}.

        out  = output                        or, guided, uncond + guidance (cond - uncond)
        x0   = a x + b out                   clipped to [-clip, clip], or to [-bound, bound] and divided by bound
        x'   = c_x0 x0 + c_x x + c_out out + sigma z
        x'   = mask k + (1 - mask) x'        with k = known_scale known + known_sigma z_k, if something is known

    With `learned`, sigma is multiplied by exp(log_variance / 2), log_variance = f log_max + (1 - f) log_min and
    f = (v + 1) / 2 for v in the second half of the output's channels (Nichol & Dhariwal 2021, eq. 15). A sample
    whose row lies outside the table is left as it is.

    Args:
        x: float32 [B, C, ...], contiguous.
        output: any float dtype, [B, C, ...] in any strides (2C channels are allowed: the second half is read only with
            `learned`); with `guidance` [2B, ...].
        coefficients: float32 [S, 11], the columns of `COLUMNS`.
        ids: int32 [S, 2]: timestep and noise id of every row.
        base: int32 [B].
        offset: added to `base`.
        seeds: int64 [B]: noise from `philox.Stream.STEP`. Or
        z: float32, the shape of x: noise that is brought along. With neither there is none.
        visit: fourth word of the noise's counter, in [0, 2^31).
        clip: largest |x0|, >= 0, or None.
        bound: float32 [B]: per-sample bound of dynamic thresholding, instead of `clip`.
        guidance: float32 [B]: classifier-free guidance scale (Ho & Salimans 2022).
        conditional_first: which half of the guided output is the conditional one; the variance is always its.
        learned: see above.
        use_output: False promises that c_out is 0 in every row.
        known: float32, the shape of x, contiguous: an image known in part. It is noised to the level of x' with z_k
            from `philox.Stream.INPAINT`, so it needs `seeds` (then z, if given, is the step's noise), and
        mask: float32 or bool, the shape of x, contiguous: 1 where `known` holds (Lugmayr et al. 2022, eq. 8).
        x_new: where to write; may be x itself. None makes a new tensor.
        x0_new: also write the (clipped) origin estimate here; float32, the shape of x, contiguous.
        model_input: also write x' here, in its dtype and memory format (contiguous, channels_last, …): the shape of
            x, or with `guidance` twice that batch.
        scale_input: write input_scale x' there, input_scale that of the sample's next row.
        timestep: int64 [B], with `guidance` [2B]: also write the timestep of each sample's next row; the last row
            repeats its own.
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: a tensor of the wrong shape, dtype, device or layout; one that is written and overlaps another
            (x_new and x excepted, as a whole); contradicting options.
    """
    _check(x, output, coefficients, ids, base, seeds, z, visit, clip, bound, guidance, learned, known, mask, x_new,
           x0_new, model_input, scale_input, timestep)  # fmt: skip
    x_new = x.clone() if x_new is None else x_new
    seeds, bound, guidance = (value if value is None else value.contiguous() for value in (seeds, bound, guidance))
    launch = implementation(choose_backend(x.device, backend))
    with on_device(x.device):
        return launch(
            x, output, coefficients.contiguous(), ids.contiguous(), base.contiguous(), offset,
            seeds=seeds, z=z, visit=visit, clip=clip, bound=bound, guidance=guidance,
            conditional_first=conditional_first, learned=learned, use_output=use_output, known=known, mask=mask,
            x_new=x_new, x0_new=x0_new, model_input=model_input, scale_input=scale_input, timestep=timestep,
        )  # fmt: skip


def step_torch(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor | list[list[Any]],
    ids: Tensor | list[list[int]],
    base: Tensor | int,
    offset: int = 0,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    conditional_first: bool = True,
    learned: bool = False,
    use_output: bool = True,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    x_new: Tensor,
    x0_new: Tensor | None = None,
    model_input: Tensor | None = None,
    scale_input: bool = False,
    timestep: Tensor | None = None,
) -> Tensor:
    """The PyTorch twin of `step`; computes in the dtype of x, float64 included (coefficients in that dtype too).

    With an int as `base` all samples are in that row, which must be inside the table: a third of the operations, and
    fewer still where coefficients and ids are those of `rows_on_host`.
    """
    row = Rows(coefficients, base, offset, x.dim())
    out, variance = split_output(x, output, guidance, conditional_first)
    x0 = row.origin(x, out, row.target(x0_new))
    if bound is not None:
        limit = row.per_sample(bound.to(x.dtype))
        x0 = x0.clamp_(-limit, limit).div_(limit)
    elif clip is not None:
        x0.clamp_(-clip, clip)
    new = row.scaled(x, row.c_x, row.target(x_new))
    row.add(new, row.c_x0, x0)
    if use_output:
        row.add(new, row.c_out, out)
    if seeds is not None and z is None:
        z = row.noise(seeds, ids, philox.Stream.STEP, visit, x)
    if z is not None:
        if learned:
            assert variance is not None
            share = variance.add(1).mul_(0.5)
            deviation = share.mul_(row.log_max - row.log_min).add_(row.log_min).mul_(0.5).exp_().mul_(row.sigma)
            new.add_(row.where_noisy(deviation).mul_(z))
        else:
            row.add(new, row.sigma, z)
    if known is not None and mask is not None and seeds is not None:
        noised = row.scaled(known, row.known_scale)
        row.add(noised, row.known_sigma, row.noise(seeds, ids, philox.Stream.INPAINT, visit, x))
        keep = mask.to(x.dtype)
        new.mul_(1 - keep).add_(noised.mul_(keep))

    row.write(x_new, new)
    if x0_new is not None:
        row.write(x0_new, x0)
    if model_input is not None:
        scaled = row.next_input_scale() * x_new if scale_input else x_new
        for half in halves(model_input, x.shape[0]):
            row.write(half, scaled)
    if timestep is not None:
        for half in halves(timestep, x.shape[0]):
            row.write_next(half, ids)
    return x_new


# Columns that multiply a tensor by themselves. A 0-dim tensor does that in half the time of a number.
_FACTORS = tuple(COLUMNS.index(name) for name in ("a", "c_x", "known_scale"))


def rows_on_host(coefficients: Tensor, ids: Tensor) -> tuple[list[list[Any]], list[list[int]]]:
    """Coefficients and ids as `step_torch` reads them fastest when all samples are in one row."""
    rows: list[list[Any]] = coefficients.tolist()
    for column in _FACTORS:
        for row, factor in zip(rows, coefficients[:, column].cpu().unbind(), strict=True):
            row[column] = factor
    return rows, ids.tolist()


class Rows:
    """The rows that the samples are in: a row each, or one (an int) for all.

    The columns are attributes: tensors [B, 1, ...] that broadcast over the samples, or numbers, which cost a third of
    the operations.
    """

    def __init__(self, coefficients: Tensor | list[list[Any]], base: Tensor | int, offset: int, dim: int) -> None:
        self.coefficients = coefficients
        self.steps = len(coefficients)
        self.active: Tensor | None = None
        self.shape = (-1,) + (1,) * (dim - 1)
        columns: Any
        if isinstance(base, int):
            self.row: Tensor | int = base + offset
            columns = coefficients[self.row]
            if isinstance(columns, Tensor):
                columns = columns.tolist()
        elif isinstance(coefficients, list):
            raise TypeError("coefficients are a tensor where every sample has a row of its own")
        else:
            row = base.long() + offset
            self.active = (row >= 0) & (row < self.steps)
            self.row = row.clamp(0, self.steps - 1)
            columns = coefficients[self.row].T.unflatten(1, self.shape).unbind(0)
        (
            self.a, self.b, self.c_x0, self.c_x, self.c_out, self.sigma, self.log_min, self.log_max,
            self.known_scale, self.known_sigma, _,
        ) = columns  # fmt: skip

    def origin(self, x: Tensor, out: Tensor, target: Tensor | None = None) -> Tensor:
        """The origin estimate before it is clipped, in `target` or in a new tensor."""
        return self.add(self.scaled(x, self.a, target), self.b, out)

    def scaled(self, x: Tensor, column: Any, out: Tensor | None = None) -> Tensor:
        """column x, in `out` or in a new tensor."""
        return torch.mul(x, column, out=out)

    def add(self, total: Tensor, column: Any, values: Tensor) -> Tensor:
        """Add column values to `total`, in place."""
        return total.add_(values, alpha=column) if self.active is None else total.add_(column * values)

    def target(self, tensor: Tensor | None) -> Tensor | None:
        """Where a result may be built: in `tensor` itself, unless some samples must stay as they are."""
        return tensor if self.active is None else None

    def where_noisy(self, deviation: Tensor) -> Tensor:
        """`deviation`, and 0 in rows whose sigma is 0: no noise is no noise, whatever the network says."""
        if self.active is not None:
            return torch.where(self.sigma == 0, self.sigma, deviation)
        return deviation if self.sigma else torch.zeros_like(deviation)

    def per_sample(self, values: Tensor) -> Tensor:
        """[B] as [B, 1, ...]."""
        return values.view(self.shape)

    def noise(self, seeds: Tensor, ids: Tensor | list[list[int]], stream: int, visit: int, x: Tensor) -> Tensor:
        """Normals of `stream` at the samples' noise ids, in the shape and dtype of x."""
        noise_ids = torch.as_tensor(ids, device=x.device)[:, 1][self.row].expand(len(x))
        return philox.normals(seeds, noise_ids, stream, x[0].numel(), visit, x.dtype).view_as(x)

    def next_input_scale(self) -> Any:
        """input_scale of the samples' next rows: [B, 1, ...] or a number."""
        if isinstance(self.row, int):
            return float(self.coefficients[min(self.row + 1, self.steps - 1)][-1])
        assert isinstance(self.coefficients, Tensor)
        return self.per_sample(self.coefficients[:, -1][(self.row + 1).clamp(max=self.steps - 1)])

    def write(self, target: Tensor, values: Tensor) -> None:
        """Put `values` in `target` where a sample's row is inside the table."""
        if self.active is None:
            if target is not values:
                target.copy_(values)
        else:
            torch.where(self.per_sample(self.active), values.to(target.dtype), target, out=target)

    def write_next(self, target: Tensor, ids: Tensor | list[list[int]]) -> None:
        """Put the timestep of the samples' next rows in `target`, where there is one."""
        if isinstance(self.row, int):
            target.fill_(int(ids[min(self.row + 1, self.steps - 1)][0]))
        elif self.active is not None:
            assert isinstance(ids, Tensor)
            following = ids[:, 0][(self.row + 1).clamp(max=self.steps - 1)].to(target.dtype)
            torch.where(self.active, following, target, out=target)


def halves(tensor: Tensor, batch: int) -> Sequence[Tensor]:
    """`tensor` in pieces of `batch` samples: itself, or the two halves of a guided batch."""
    return (tensor,) if tensor.shape[0] == batch else tensor.split(batch)


def split_output(
    x: Tensor, output: Tensor, guidance: Tensor | None, conditional_first: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The (guided) prediction and, if there is one, the second half of the channels, in the dtype of x."""
    batch, channels = x.shape[:2]
    if output.dtype is not x.dtype:
        output = output.to(x.dtype)
    if guidance is None:
        return (output, None) if output.shape[1] == channels else (output[:, :channels], output[:, channels:])
    first, second = output.split(batch)
    conditional, unconditional = (first, second) if conditional_first else (second, first)
    scale = guidance.to(x.dtype).view(batch, *(1,) * (x.dim() - 1))
    # Only the mean is guided; the variance is the conditional half's.
    return torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale), conditional[:, channels:]


def implementation(backend: str) -> Callable[..., Tensor]:
    """The unchecked function behind `step`: for callers whose buffers cannot change, x_new always given."""
    if backend == "torch":
        return step_torch
    from ddpm_fast.kernels.step_triton import step_triton

    return step_triton


def _check(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    base: Tensor,
    seeds: Tensor | None,
    z: Tensor | None,
    visit: int,
    clip: float | None,
    bound: Tensor | None,
    guidance: Tensor | None,
    learned: bool,
    known: Tensor | None,
    mask: Tensor | None,
    x_new: Tensor | None,
    x0_new: Tensor | None,
    model_input: Tensor | None,
    scale_input: bool,
    timestep: Tensor | None,
) -> None:
    shape, device = tuple(x.shape), x.device
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be a non-empty [B, C, ...] tensor, got shape {shape}")
    check_tensor("x", x, shape, (torch.float32,), device)
    check_contiguous("x", x)
    batch, channels = shape[:2]
    halves = 1 if guidance is None else 2
    widths = (2 * channels,) if learned else (channels, 2 * channels)
    width = output.shape[1] if output.dim() > 1 and output.shape[1] in widths else widths[0]
    check_tensor("output", output, (halves * batch, width, *shape[2:]), FLOATS, device)
    if len(coefficients) == 0:
        raise ValueError("coefficients must have at least one row")
    check_tensor("coefficients", coefficients, (len(coefficients), len(COLUMNS)), (torch.float32,), device)
    check_tensor("ids", ids, (len(coefficients), 2), (torch.int32,), device)
    check_tensor("base", base, (batch,), (torch.int32,), device)
    check_visit(visit)
    if seeds is not None:
        check_seeds(seeds, batch, device)
    for name, tensor in (("bound", bound), ("guidance", guidance)):
        if tensor is not None:
            check_tensor(name, tensor, (batch,), (torch.float32,), device)
    for name, tensor in (("z", z), ("known", known), ("x_new", x_new), ("x0_new", x0_new)):
        if tensor is not None:
            check_tensor(name, tensor, shape, (torch.float32,), device)
            check_contiguous(name, tensor)
    if mask is not None:
        check_tensor("mask", mask, shape, (torch.float32, torch.bool), device)
        check_contiguous("mask", mask)
    if model_input is not None:
        check_tensor("model_input", model_input, (halves * batch, *shape[1:]), FLOATS, device)
        check_writable("model_input", model_input)
    if timestep is not None:
        check_tensor("timestep", timestep, (halves * batch,), (torch.int64,), device)
        check_contiguous("timestep", timestep)
    _check_options(seeds, z, clip, bound, known, mask, model_input, scale_input)
    check_disjoint(
        {"x_new": x_new, "x0_new": x0_new, "model_input": model_input, "timestep": timestep},
        {"x": x, "output": output, "coefficients": coefficients, "ids": ids, "base": base, "seeds": seeds, "z": z,
         "bound": bound, "guidance": guidance, "known": known, "mask": mask},
        in_place=("x_new", "x"),
    )  # fmt: skip


def _check_options(
    seeds: Tensor | None,
    z: Tensor | None,
    clip: float | None,
    bound: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    model_input: Tensor | None,
    scale_input: bool,
) -> None:
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip must be >= 0, got {clip}")
    if clip is not None and bound is not None:
        raise ValueError("x0 is limited by clip or by bound, not by both")
    if (known is None) != (mask is None):
        raise ValueError("known and mask belong together: give both or neither")
    if known is not None and seeds is None:
        raise ValueError("known needs seeds: it is noised to the level of the step")
    if known is None and seeds is not None and z is not None:
        raise ValueError("noise comes from seeds or from z, not from both")
    if scale_input and model_input is None:
        raise ValueError("scale_input needs model_input: there is nothing to scale")
