"""Forward noising in closed form: x_t from x_0 (Ho et al. 2020, eq. 4)."""

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import check_contiguous, check_seeds, check_tensor, check_visit
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
        x0: float32 [B, ...], contiguous.
        t: int32 or int64 [B], each in [0, T): not checked, so that nothing waits for the device.
        alphas_cumprod: float64 [T].
        seeds: int64 [B]: noise from `philox.Stream.FORWARD` with noise id t. Or
        z: float32, the shape of x0.
        visit: fourth word of the noise's counter, in [0, 2^31).
        x_t: where to write; may be x0 itself. None makes a new tensor.
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: a tensor of the wrong shape, dtype, device or layout; not exactly one of seeds and z.
    """
    shape, device = tuple(x0.shape), x0.device
    if x0.numel() == 0:
        raise ValueError(f"x0 must not be empty, got shape {shape}")
    check_tensor("t", t, shape[:1], (torch.int32, torch.int64), device)
    check_tensor("alphas_cumprod", alphas_cumprod, (len(alphas_cumprod),), (torch.float64,), device)
    check_visit(visit)
    if (seeds is None) == (z is None):
        raise ValueError("noise comes from exactly one of seeds and z")
    if seeds is not None:
        check_seeds(seeds, len(x0), device)
    for name, tensor in (("x0", x0), ("z", z), ("x_t", x_t)):
        if tensor is not None:
            check_tensor(name, tensor, shape, (torch.float32,), device)
            check_contiguous(name, tensor)
    x_t = torch.empty_like(x0) if x_t is None else x_t
    t, alphas_cumprod = t.contiguous(), alphas_cumprod.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    if choose_backend(device, backend) == "torch":
        return q_sample_torch(x0, t, alphas_cumprod, seeds=seeds, z=z, visit=visit, x_t=x_t)
    from ddpm_fast.kernels.q_sample_triton import q_sample_triton

    with on_device(device):
        return q_sample_triton(x0, t, alphas_cumprod, seeds=seeds, z=z, visit=visit, x_t=x_t)


def q_sample_torch(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor,
) -> Tensor:
    """The PyTorch twin of `q_sample`; computes in the dtype of x0, float64 included."""
    alpha_bar = alphas_cumprod[t].view(-1, *(1,) * (x0.dim() - 1))
    if seeds is not None:
        z = philox.normals(seeds, t, philox.Stream.FORWARD, x0[0].numel(), visit, x0.dtype).view_as(x0)
    noisy = alpha_bar.sqrt().to(x0.dtype) * x0
    return x_t.copy_(noisy.addcmul_((1 - alpha_bar).sqrt().to(x0.dtype), z))  # type: ignore[arg-type]
