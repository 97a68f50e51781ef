"""The forward process: in closed form from x_0, and one step at a time (Ho et al. 2020, eq. 4 and eq. 2)."""

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import check_contiguous, check_disjoint, check_seeds, check_tensor, check_visit
from ddpm_fast.kernels.dispatch import choose_backend, on_device


def q_sample(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) z, each sample at its own timestep.

    Args:
        x0: The data, float32 [B, ...], contiguous.
        t: Timesteps, int32 or int64 [B], each in [0, T). They are not checked, so that the host does not wait.
        alphas_cumprod: alpha_bar, float64 [T].
        seeds: Seeds of the samples, int64 [B]. The noise comes from `philox.Stream.FORWARD` with noise id t.
        z: Noise, float32, the shape of x0, instead of seeds.
        visit: Fourth word of the noise's counter, in [0, 2^31).
        x_t: Where to write; may be x0 itself. None makes a new tensor.
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype, device or layout; x_t overlaps a part of another tensor; or
            there are both seeds and z, or neither.
    """
    _check({"x0": x0, "z": z, "x_t": x_t}, t, {"alphas_cumprod": alphas_cumprod}, seeds, visit)
    return _launch(x0, t, alphas_cumprod, philox.Stream.FORWARD, seeds, z, visit, x_t, backend)


def q_step(
    x: Tensor,
    t: Tensor,
    alphas: Tensor,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return x_t = sqrt(alpha_t) x_{t-1} + sqrt(1 - alpha_t) z, alpha_t = 1 - beta_t, from x = x_{t-1}.

    t = 0 takes x_0 of the data to x_0 of the process. Arguments and errors are those of `q_sample`, with `alphas` in
    place of `alphas_cumprod`. The noise comes from `philox.Stream.FORWARD_STEP`: it is independent of the noise of
    `q_sample`, and from step to step.
    """
    _check({"x": x, "z": z, "x_t": x_t}, t, {"alphas": alphas}, seeds, visit)
    return _launch(x, t, alphas, philox.Stream.FORWARD_STEP, seeds, z, visit, x_t, backend)


def q_sample_torch(
    x: Tensor,
    t: Tensor,
    alphas: Tensor,
    stream: int,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor,
) -> Tensor:
    """Compute x_t on PyTorch: the twin of both, for a given stream, in the dtype of x, float64 included."""
    alpha = alphas[t].view(-1, *(1,) * (x.dim() - 1))
    if seeds is not None:
        z = philox.normals(seeds, t, stream, x[0].numel(), visit, x.dtype).view_as(x)
    noisy = alpha.sqrt().to(x.dtype) * x
    return x_t.copy_(noisy.addcmul_((1 - alpha).sqrt().to(x.dtype), z))  # type: ignore[arg-type]


def _check(
    states: dict[str, Tensor | None], t: Tensor, alphas: dict[str, Tensor], seeds: Tensor | None, visit: int
) -> None:
    """Check the arguments; the states x, z and x_t come under the names that the caller uses."""
    source, x = next(iter(states.items()))
    assert x is not None  # for the type checker: only z and x_t may be missing
    shape, device = tuple(x.shape), x.device
    if x.numel() == 0:
        raise ValueError(f"{source} must not be empty, got shape {shape}")
    check_tensor("t", t, shape[:1], (torch.int32, torch.int64), device)
    for name, tensor in alphas.items():
        check_tensor(name, tensor, (len(tensor),), (torch.float64,), device)
    check_visit(visit)
    if (seeds is None) == (states["z"] is None):
        raise ValueError("noise comes from exactly one of seeds and z")
    if seeds is not None:
        check_seeds(seeds, len(x), device)
    for name, state in states.items():
        if state is not None:
            check_tensor(name, state, shape, (torch.float32,), device)
            check_contiguous(name, state)
    read = {source: x, "z": states["z"], "t": t, "seeds": seeds, **alphas}
    check_disjoint({"x_t": states["x_t"]}, read, in_place=("x_t", source))


def _launch(
    x: Tensor,
    t: Tensor,
    alphas: Tensor,
    stream: int,
    seeds: Tensor | None,
    z: Tensor | None,
    visit: int,
    x_t: Tensor | None,
    backend: str | None,
) -> Tensor:
    x_t = torch.empty_like(x) if x_t is None else x_t
    t, alphas = t.contiguous(), alphas.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    if choose_backend(x.device, backend) == "torch":
        return q_sample_torch(x, t, alphas, stream, seeds=seeds, z=z, visit=visit, x_t=x_t)
    from ddpm_fast.kernels.q_sample_triton import q_sample_triton

    with on_device(x.device):
        return q_sample_triton(x, t, alphas, stream, seeds=seeds, z=z, visit=visit, x_t=x_t)
