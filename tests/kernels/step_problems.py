"""Steps to take, with every option: their arguments, their right results, and launches into guarded buffers."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ddpm_fast.kernels.step import COLUMNS, step
from tests.kernels.guarded import Guarded
from tests.kernels.judges import EPS, noise

BACKENDS = ("torch", "triton")
STEPS = 7
NORMAL_ATOL = 6e-4 if torch.cuda.is_available() else 4e-6  # of test_normal.py
OPTIONS = {
    "bare": {},
    "philox": {"noise": "philox"},
    "tensor noise": {"noise": "tensor"},
    "clip": {"limit": "clip"},
    "bound": {"limit": "bound"},
    "without output": {"use_output": False},
    "doubled": {"doubled": True},
    "guided": {"guided": True},
    "guided doubled": {"guided": True, "doubled": True},
    "learned": {"learned": True, "noise": "tensor"},
    "learned without noise": {"learned": True},
    "learned philox": {"learned": True, "noise": "philox"},
    "learned guided": {"learned": True, "guided": True, "noise": "tensor"},
    "learned guided philox": {"learned": True, "guided": True, "noise": "philox"},
    "inpaint": {"inpaint": "soft", "noise": "philox"},
    "inpaint, bool mask": {"inpaint": "bool", "noise": "philox"},
    "inpaint tensor noise": {"inpaint": "soft", "noise": "tensor"},
    "float16 output": {"output_dtype": torch.float16},
    "bfloat16 output": {"output_dtype": torch.bfloat16},
    "float64 output": {"output_dtype": torch.float64},
    "all": {
        "noise": "philox", "limit": "bound", "guided": True, "learned": True, "output_dtype": torch.bfloat16,
        "inpaint": "soft",
    },
}  # fmt: skip


@dataclass
class Problem:
    """The arguments of a step as float64 numpy arrays, all exact in float32 (the output in its own dtype)."""

    x: np.ndarray
    output: np.ndarray
    coefficients: np.ndarray
    ids: np.ndarray
    base: np.ndarray
    offset: int = 2
    output_dtype: torch.dtype = torch.float32
    use_output: bool = True
    learned: bool = False
    clip: float | None = None
    arrays: dict = field(default_factory=dict)  # seeds, z, bound, guidance, known, mask

    @property
    def noisy(self):
        """Whether the step itself draws noise; the known image's is another matter."""
        return "z" in self.arrays or "seeds" in self.arrays

    def arguments(self, device="cpu", dtype=torch.float32):
        """Positional and keyword arguments of `step`, the state in `dtype`."""

        def tensor(array, dtype):
            return torch.tensor(array, device=device).to(dtype)

        dtypes = {"seeds": torch.int64, "z": dtype, "bound": dtype, "guidance": dtype, "known": dtype}
        dtypes["mask"] = torch.bool if self.arrays.get("mask", np.empty(0)).dtype == bool else dtype
        return (
            tensor(self.x, dtype),
            tensor(self.output, torch.float64).to(self.output_dtype),
            tensor(self.coefficients, dtype),
            tensor(self.ids, torch.int32),
            tensor(self.base, torch.int32),
            self.offset,
        ), {
            "clip": self.clip,
            "learned": self.learned,
            "use_output": self.use_output,
            **{name: tensor(array, dtypes[name]) for name, array in self.arrays.items()},
        }


def make(
    shape, *, noise="none", limit="none", guided=False, learned=False, doubled=False, use_output=True,
    inpaint="none", output_dtype=torch.float32, offset=2, seed=0,
):  # fmt: skip
    """A random table, a random state, and every sample in a row of its own."""
    rng = np.random.default_rng([seed, *shape])

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32).astype(np.float64)

    batch, channels = shape[:2]
    width = 2 * channels if learned or doubled else channels
    output = torch.tensor(normal(batch * (2 if guided else 1), width, *shape[2:])).to(output_dtype).double().numpy()
    coefficients = normal(STEPS, len(COLUMNS))
    coefficients[:, 6:8] = np.sort(-4 * abs(coefficients[:, 6:8]), axis=1).astype(np.float32)
    if not use_output:
        coefficients[:, 4] = 0
    arrays = {}
    if noise == "philox" or inpaint != "none":
        arrays["seeds"] = rng.integers(-(2**63), 2**63, batch)
    if noise == "tensor":
        arrays["z"] = normal(*shape)
    if limit == "bound":
        arrays["bound"] = (0.25 + abs(normal(batch))).astype(np.float32).astype(np.float64)
    if guided:
        arrays["guidance"] = 2 * normal(batch)
    if inpaint != "none":
        arrays["known"] = normal(*shape)
        arrays["mask"] = rng.random(shape) < 0.5
        if inpaint == "soft":
            arrays["mask"] = np.where(arrays["mask"], 1, rng.random(shape).astype(np.float32)).astype(np.float64)
    return Problem(
        x=normal(*shape),
        output=output,
        coefficients=coefficients,
        ids=rng.integers(0, 1000, (STEPS, 2)),
        base=rng.permutation(STEPS)[:batch] - offset,
        offset=offset,
        output_dtype=output_dtype,
        use_output=use_output,
        learned=learned,
        clip=0.75 if limit == "clip" else None,
        arrays=arrays,
    )


def judge(p):
    """x', x0, and for either the bound of its rounding in float32.

    Every term takes fewer than 16 roundings on its way, so the bound is 16 EPS times the sum of the terms' absolute
    values; clipping makes no error larger. Noise that is made on the way brings its own error, times its factor.
    """
    batch, channels = p.x.shape[:2]
    row = p.base + p.offset
    columns = p.coefficients[row].T.reshape(len(COLUMNS), batch, *[1] * (p.x.ndim - 1))
    a, b, c_x0, c_x, c_out, sigma, log_min, log_max, known_scale, known_sigma = columns
    first, second = p.output[:batch], p.output[batch:]
    out, v = first[:, :channels], first[:, channels:]
    size = abs(out)
    if "guidance" in p.arrays:
        other = second[:, :channels]
        scale = p.arrays["guidance"].reshape(a.shape)
        size = abs(other) + abs(scale) * (abs(out) + abs(other))
        out = other + scale * (out - other)
    x0, x0_size = a * p.x + b * out, abs(a * p.x) + abs(b) * size
    if p.clip is not None:
        x0 = np.clip(x0, -p.clip, p.clip)
    if "bound" in p.arrays:
        limit = p.arrays["bound"].reshape(a.shape)
        x0, x0_size = np.clip(x0, -limit, limit) / limit, x0_size / limit + 1
    new, new_size = c_x0 * x0 + c_x * p.x, abs(c_x0) * x0_size + abs(c_x * p.x)
    if p.use_output:
        new, new_size = new + c_out * out, new_size + abs(c_out) * size
    own_error = 0
    if p.noisy:
        if p.learned:
            share = (v + 1) / 2
            sigma = sigma * np.exp((share * log_max + (1 - share) * log_min) / 2)
            sigma_size = abs(sigma) * (1 + (1 + abs(share)) * (abs(log_min) + abs(log_max)))
        else:
            sigma_size = abs(sigma)
        z = p.arrays.get("z")
        if z is None:
            z = philox_noise(p, row, 1)
            own_error = NORMAL_ATOL * abs(sigma)
        new, new_size = new + sigma * z, new_size + sigma_size * abs(z)
    if "known" in p.arrays:
        z = philox_noise(p, row, 3)
        keep = p.arrays["mask"].astype(np.float64)
        known = known_scale * p.arrays["known"] + known_sigma * z
        known_size = abs(known_scale * p.arrays["known"]) + abs(known_sigma * z)
        new, new_size = keep * known + (1 - keep) * new, keep * known_size + (1 - keep) * new_size
        own_error = keep * NORMAL_ATOL * abs(known_sigma) + (1 - keep) * own_error
    return new, x0, 16 * EPS * new_size + own_error, 16 * EPS * x0_size


def philox_noise(p, row, stream):
    """The normals of a stream at the samples' noise ids, by the judge."""
    ids = p.ids[row, 1]
    z = [noise(int(s), int(i), stream, 0, p.x[0].size) for s, i in zip(p.arrays["seeds"], ids, strict=True)]
    return np.stack(z).reshape(p.x.shape)


def device_of(backend, kernel_device):
    return kernel_device if backend == "triton" else torch.device("cpu")


def launch(
    p, backend, kernel_device, *, in_place=False, input_dtype=None, channels_last=False, timestep=None, layout=None,
    **changes,
):  # fmt: skip
    """Step with every output in a guarded buffer; returns x', x0, model_input and timestep.

    `layout` lays the network's output out anew.
    """
    device = device_of(backend, kernel_device)
    (x, output, *rest), keywords = p.arguments(device)
    output = output if layout is None else layout(output)
    halves = 2 if "guidance" in p.arrays else 1
    new, x0 = Guarded(x.shape, device=device), Guarded(x.shape, device=device)
    following = Guarded((halves * len(x),), torch.int64, device)
    buffers = [new, x0, following]
    if in_place:
        new.tensor.copy_(x)
        x = new.tensor
    if timestep is not None:
        following.tensor.copy_(torch.as_tensor(timestep))
    model_input = None
    if input_dtype is not None:
        buffers.append(Guarded((halves * len(x), *x.shape[1:]), input_dtype, device, channels_last))
        model_input = buffers[-1].tensor
    result = step(
        x,
        output,
        *rest,
        **keywords | changes,
        x_new=new.tensor,
        x0_new=x0.tensor,
        model_input=model_input,
        timestep=following.tensor,
        backend=backend,
    )
    assert result is new.tensor
    assert all(buffer.is_intact() for buffer in buffers)
    return result, x0.tensor, model_input, following.tensor


def rounded(tensor, dtype, backend):
    """`tensor` as the model input must hold it: rounded to nearest, but Triton's interpreter cuts bfloat16 off."""
    if dtype == torch.bfloat16 and backend == "triton" and not torch.cuda.is_available():
        return (tensor.view(torch.int32) & -(1 << 16)).view(torch.float32).to(dtype)
    return tensor.to(dtype)


def assert_near(p, result, x0):
    new, origin, new_bound, origin_bound = judge(p)
    assert np.all(abs(x0.double().cpu().numpy() - origin) <= origin_bound)
    assert np.all(abs(result.double().cpu().numpy() - new) <= new_bound)
