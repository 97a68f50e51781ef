"""`step`: the kernel and its PyTorch twin against the formula in float64 numpy, option by option."""

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.kernels import tile_triton
from ddpm_fast.kernels.dispatch import interpreting
from ddpm_fast.kernels.step import COLUMNS, rows_on_host, step, step_torch
from tests.kernels.step_problems import BACKENDS, OPTIONS, STEPS, assert_near, device_of, judge, launch, make, rounded

SHAPES = [
    (2, 1), (3, 5), (2, 63), (2, 3, 4, 5), (2, 1, 12, 12), (3, 145), (2, 3, 33, 7),
    (2, 2, 40), (2, 2, 3, 4, 5), (1, 3, 32, 32),
]  # fmt: skip
FEW_SHAPES = [(3, 5), (2, 3, 4, 5), (2, 3, 33, 7)]

LAYOUTS = {
    "channels last": lambda output: output.movedim(1, -1).contiguous().movedim(-1, 1),
    "slice of the channels": lambda output: torch.cat([output, output.flip(1)], 1)[:, : output.shape[1]],
    "every second element": lambda output: torch.stack([output, output + 1], -1)[..., 0],
    "batch innermost": lambda output: output.movedim(0, -1).contiguous().movedim(-1, 0),
    "rows apart, at no one stride": lambda output: torch.cat([output, output + 1], -1)[..., : output.shape[-1]],
}


class TestAgainstFloat64:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
    def test_every_option(self, options, shape, backend, kernel_device):
        p = make(shape, **options)
        result, x0, _, _ = launch(p, backend, kernel_device)
        assert_near(p, result, x0)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("options", ["philox", "all"])
    def test_every_shape(self, options, shape, backend, kernel_device):
        p = make(shape, **OPTIONS[options], seed=1)
        result, x0, _, _ = launch(p, backend, kernel_device)
        assert_near(p, result, x0)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
    def test_twin_in_float64(self, options):
        p = make((2, 3, 4, 5), **options)
        positional, keywords = p.arguments(dtype=torch.float64)
        x0, target = (torch.full(p.x.shape, float("nan"), dtype=torch.float64) for _ in range(2))
        result = step_torch(*positional, **keywords, x0_new=x0, x_new=target).numpy()
        new, origin, new_bound, origin_bound = judge(p)
        if "seeds" in p.arrays:
            new_bound = new_bound + 1e-6  # divided by 2^29 below: the normals, right to 2e-14 (test_normal.py)
        # The bounds of float32 with 29 bits more.
        assert np.all(abs(result - new) <= new_bound * 2.0**-29 + (1e-13 if "seeds" in p.arrays else 0))
        assert np.all(abs(x0.numpy() - origin) <= origin_bound * 2.0**-29)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
    def test_twin_with_one_row_for_all(self, options, kernel_device):
        """An int as base is a short way to a table row that all samples share, in every output."""
        p = make((3, 3, 4, 5), **options)
        p.base = np.full(3, 4 - p.offset)
        expected = launch(p, "torch", kernel_device, input_dtype=torch.float32)
        (x, output, coefficients, ids, _, offset), keywords = p.arguments()
        outputs = [torch.full_like(tensor, -1) for tensor in expected]
        new, x0, model_input, timestep = outputs
        step_torch(
            x, output, coefficients, ids, 4 - p.offset, offset, **keywords,
            x_new=new, x0_new=x0, model_input=model_input, timestep=timestep,
        )  # fmt: skip
        for tensor, other in zip(outputs, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-6)  # the columns broadcast as numbers
        assert torch.equal(timestep, expected[3])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("offset", [0, 1, 16])
    def test_offset(self, offset, backend, kernel_device):
        p = make((3, 5), noise="philox", offset=offset)
        result, x0, _, _ = launch(p, backend, kernel_device)
        assert_near(p, result, x0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_table_of_one_row(self, backend, kernel_device):
        p = make((1, 5), noise="philox", offset=0)
        p.coefficients, p.ids, p.base = p.coefficients[:1], p.ids[:1], np.array([0])
        result, x0, _, _ = launch(p, backend, kernel_device)
        assert_near(p, result, x0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_clip_at_0(self, backend, kernel_device):
        """A bound of 0 is a bound, not the absence of one."""
        p = make((3, 5))
        p.clip = 0.0
        result, x0, _, _ = launch(p, backend, kernel_device)
        assert_near(p, result, x0)
        assert not x0.any()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 24, 17)], ids=str)
    @pytest.mark.parametrize("options", ["learned guided", "bfloat16 output"])
    def test_output_of_any_layout(self, options, shape, layout, backend, kernel_device):
        """A network that answers in channels_last, or with a part of something larger."""
        p = make(shape, **OPTIONS[options])
        plain, x0, _, _ = launch(p, backend, kernel_device)
        assert not layout(p.arguments()[0][1]).is_contiguous()
        result, origin, _, _ = launch(p, backend, kernel_device, layout=layout)
        assert torch.equal(result, plain)
        assert torch.equal(origin, x0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strides_of_more_than_31_bits(self, backend, kernel_device):
        """The second sample lies 2^31 + 64 elements after the first, in the network's output and in its next input."""
        far = 2**31 + 64
        p = make((2, 3, 4, 4), noise="philox", output_dtype=torch.float16)
        expected, _, expected_input, _ = launch(p, backend, kernel_device, input_dtype=torch.float16)
        device = device_of(backend, kernel_device)
        (x, output, *rest), keywords = p.arguments(device)
        spread = [  # memory that nobody touches is not taken
            torch.empty(far + 48, dtype=torch.float16, device=device).as_strided((2, 3, 4, 4), (far, 16, 4, 1))
            for _ in range(2)
        ]
        spread[0].copy_(output)
        result = step(x, spread[0], *rest, **keywords, model_input=spread[1], backend=backend)
        assert torch.equal(result, expected)
        assert torch.equal(spread[1], expected_input)

    def test_more_samples_than_a_grid_has_rows(self, kernel_device, monkeypatch):
        """65,535 samples fill the second dimension of a grid; here 3 do. For compiled kernels see below."""
        if torch.cuda.is_available():
            pytest.skip("only the interpreter reads the number anew")
        p = make((7, 2, 9), noise="philox")
        expected, _, _, _ = launch(p, "triton", kernel_device)
        monkeypatch.setattr(tile_triton, "ROWS", tl.constexpr(3))
        assert tile_triton.grid(7, 18) == (1, 3, 3)
        result, _, _, _ = launch(p, "triton", kernel_device)
        assert torch.equal(result, expected)

    @pytest.mark.gpu
    def test_more_than_2_to_the_31_elements(self):
        """Ten times the rows of a grid, and 8 GB of state: the last sample is what it is by itself."""
        batch = 2**31 // 3072 + 2
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB of memory on the GPU")
        p = make((1, 3, 1024), noise="philox", limit="clip", output_dtype=torch.bfloat16)
        (x, output, coefficients, ids, base, offset), keywords = p.arguments("cuda")
        alone = step(x, output, coefficients, ids, base, offset, **keywords)
        state = torch.zeros(batch, 3, 1024, device="cuda")
        outputs = torch.zeros(batch, 3, 1024, dtype=torch.bfloat16, device="cuda")
        state[-1], outputs[-1] = x[0], output[0]
        seeds = keywords["seeds"].expand(batch)
        step(state, outputs, coefficients, ids, base.expand(batch), offset, **keywords | {"seeds": seeds}, x_new=state)
        assert state.numel() > 2**31
        assert torch.equal(state[-1], alone[0])
        assert torch.equal(state[0], state[batch // 2])  # the same seed, the same zeros

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_strided_vectors(self, backend, kernel_device):
        """Views as people make them: one row and one guidance scale for all, every second seed.

        All inside larger tensors, so that reading on as if they were contiguous gives wrong samples, not a crash.
        """
        p = make((2, 5), noise="philox", guided=True)
        p.base, p.arrays["guidance"] = np.array([3, 3]), np.array([2.5, 2.5])
        device = device_of(backend, kernel_device)
        (x, output, coefficients, ids, _, offset), keywords = p.arguments(device)
        keywords["guidance"] = torch.tensor([2.5, 9.0], device=device)[:1].expand(2)
        keywords["seeds"] = keywords["seeds"].repeat_interleave(2)[::2]
        base = torch.tensor([3, 1], dtype=torch.int32, device=device)[:1].expand(2)
        coefficients = torch.cat([coefficients, coefficients + 1], 1)[:, : len(COLUMNS)]
        ids = torch.cat([ids, ids + 1], 1)[:, :2]
        result = step(x, output, coefficients, ids, base, offset, **keywords, backend=backend)
        new, _, bound, _ = judge(p)
        assert np.all(abs(result.double().cpu().numpy() - new) <= bound)


@pytest.mark.parametrize("backend", BACKENDS)
class TestOutputs:
    @pytest.mark.parametrize("options", ["bare", "guided", "all"])
    def test_in_place(self, options, backend, kernel_device):
        p = make((2, 3, 33, 7), **OPTIONS[options])
        apart, _, _, _ = launch(p, backend, kernel_device)
        within, _, _, _ = launch(p, backend, kernel_device, in_place=True)
        assert torch.equal(within, apart)

    def test_gradients_are_not_followed(self, backend, kernel_device):
        p = make((2, 3, 4, 5), noise="philox")
        (x, output, *rest), keywords = p.arguments(device_of(backend, kernel_device))
        result = step(x.requires_grad_(), output, *rest, **keywords, backend=backend)
        assert not result.requires_grad
        assert torch.equal(result, launch(p, backend, kernel_device)[0])

    def test_makes_its_own_target(self, backend, kernel_device):
        p = make((2, 3, 4, 5), noise="philox")
        positional, keywords = p.arguments(device_of(backend, kernel_device))
        before = positional[0].clone()
        result = step(*positional, **keywords, backend=backend)
        assert torch.equal(result, launch(p, backend, kernel_device)[0])
        assert torch.equal(positional[0], before)

    @pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_model_input_is_the_result_rounded(self, dtype, guided, backend, kernel_device):
        p = make((2, 3, 33, 7), noise="philox", guided=guided)
        result, _, model_input, _ = launch(p, backend, kernel_device, input_dtype=dtype)
        for half in model_input.split(2):
            assert torch.equal(half, rounded(result, dtype, backend))

    @pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
    @pytest.mark.parametrize("shape", [(2, 3, 33, 7), (2, 3, 5, 4), (2, 1, 4, 4), (2, 5, 300), (3, 4)], ids=str)
    def test_model_input_in_channels_last(self, shape, guided, backend, kernel_device):
        p = make(shape, noise="philox", guided=guided)
        result, _, plain, _ = launch(p, backend, kernel_device, input_dtype=torch.float16)
        same, _, model_input, _ = launch(p, backend, kernel_device, input_dtype=torch.float16, channels_last=True)
        assert torch.equal(result, same)
        assert torch.equal(model_input, plain)

    @pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
    def test_timestep_of_the_next_row(self, guided, backend, kernel_device):
        p = make((5, 3), guided=guided)
        p.base = np.array([0, 3, 1, 5, 2]) - p.offset
        _, _, _, timestep = launch(p, backend, kernel_device)
        assert timestep.tolist() == p.ids[[1, 4, 2, 6, 3], 0].tolist() * (2 if guided else 1)

    def test_timestep_after_the_last_row(self, backend, kernel_device):
        """There is no next row: what the network was told last stays."""
        p = make((2, 3))
        p.base = np.array([STEPS - 1, STEPS - 2]) - p.offset
        last = int(p.ids[-1, 0])
        _, _, _, timestep = launch(p, backend, kernel_device, timestep=[last, last + 1])
        assert timestep.tolist() == [last, last]

    @pytest.mark.parametrize("outside", [-1, -(2**20), STEPS, STEPS + 2**20])
    @pytest.mark.parametrize("options", ["bare", "all"])
    def test_a_row_outside_the_table_changes_nothing(self, options, outside, backend, kernel_device):
        p = make((3, 2, 9), **OPTIONS[options])
        p.base[1] = outside - p.offset
        result, x0, _, timestep = launch(p, backend, kernel_device, in_place=True)
        assert np.array_equal(result[1].double().cpu(), p.x[1])
        assert x0[1].isnan().all()
        assert (timestep.view(-1, 3)[:, 1] == 77).all()
        p.base[1] = 0
        new, origin, new_bound, origin_bound = judge(p)
        for i in (0, 2):
            assert np.all(abs(result[i].double().cpu().numpy() - new[i]) <= new_bound[i])
            assert np.all(abs(x0[i].double().cpu().numpy() - origin[i]) <= origin_bound[i])

    def test_a_row_outside_the_table_is_not_written(self, backend, kernel_device):
        p = make((3, 2, 9), guided=True)
        p.base[1] = STEPS
        result, _, _, _ = launch(p, backend, kernel_device)
        assert result.isnan().flatten(1).all(1).tolist() == [False, True, False]
        _, _, model_input, _ = launch(p, backend, kernel_device, in_place=True, input_dtype=torch.float32)
        assert model_input.isnan().flatten(1).all(1).tolist() == [False, True, False] * 2

    def test_a_row_outside_the_table_keeps_x_in_a_new_tensor(self, backend, kernel_device, monkeypatch):
        """Where step makes x_new itself there is nothing else that it could leave."""
        p = make((3, 2, 9))
        p.base[1] = STEPS
        positional, keywords = p.arguments(device_of(backend, kernel_device))
        monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, torch.nan))
        result = step(*positional, **keywords, backend=backend)
        assert torch.equal(result[1], positional[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
class TestNotFinite:
    @pytest.mark.parametrize("limit", ["none", "clip", "bound"])
    def test_nan_stays_nan(self, limit, backend, kernel_device):
        """Clipping must not turn a network's NaN into a number: the engine looks for it at the end."""
        p = make((2, 3, 4, 5), limit=limit, use_output=False)
        p.output[1, 2, 3, 4] = np.nan
        result, x0, _, _ = launch(p, backend, kernel_device)
        for tensor in (result, x0):
            assert tensor.isnan().nonzero().tolist() == [[1, 2, 3, 4]]

    @pytest.mark.parametrize("limit", ["clip", "bound"])
    def test_infinity_is_clipped(self, limit, backend, kernel_device):
        p = make((2, 3, 4, 5), limit=limit, use_output=False)
        p.output[0, 0, 0, 0], p.output[1, 2, 3, 4] = np.inf, -np.inf
        result, x0, _, _ = launch(p, backend, kernel_device)
        b = p.coefficients[p.base + p.offset, 1]
        largest = p.clip or 1  # the bound divides, so that 1 is the largest
        assert x0[0, 0, 0, 0].item() == np.sign(b[0]) * largest
        assert x0[1, 2, 3, 4].item() == -np.sign(b[1]) * largest
        assert result.isfinite().all()


SPECIAL = np.array([np.nan, np.inf, -np.inf, 1e-42, -1e-42])
SPECIAL_OPTIONS = (
    "philox", "tensor noise", "clip", "bound", "without output", "guided", "learned", "learned philox", "inpaint",
    "float16 output", "bfloat16 output", "all",
)  # fmt: skip


def with_special_values(p, name):
    """Put each special value into another sample: into one element of it, or into its number."""
    array = p.arrays[name] if name in p.arrays else getattr(p, name.partition(":")[0])
    if name.startswith("coefficients"):
        array[p.base + p.offset, int(name.partition(":")[2])] = SPECIAL
    elif array.ndim == 1:
        array[:] = SPECIAL
    else:
        array[np.arange(len(array)), 0, 1, 1] = np.resize(SPECIAL, len(array))
        array[np.arange(len(array)), -1, 0, 2] = np.resize(SPECIAL, len(array))  # where a variance is learned, it


def special_problems(options):
    """A step with special values in each tensor in turn, with the tensor's name.

    The bounds of a learned log-variance are finite in every table: kernel and twin combine them in another order.
    """
    columns = [f"coefficients:{number}" for number in (0, 1, 2, 3, 4, 5, 8, 9)]
    floats = [name for name in make((5, 2, 3, 4), **OPTIONS[options]).arrays if name != "seeds"]
    for name in ("x", "output", *floats, *columns):
        p = make((5, 2, 3, 4), **OPTIONS[options])
        with_special_values(p, name)
        yield name, p


@pytest.mark.parametrize("options", SPECIAL_OPTIONS)
def test_special_values_in_every_tensor(options, kernel_device):
    """NaN, infinity and denormals: the kernel says what its twin says, and hands it on to the denoiser."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    for (name, p), dtype in zip(special_problems(options), dtypes, strict=False):
        twin, found = (launch(p, backend, kernel_device, input_dtype=dtype) for backend in BACKENDS)
        near = {"equal_nan": True, "rtol": 1e-4, "atol": 1e-4, "msg": lambda text, name=name: f"{name}: {text}"}
        for tensor, expected in zip(found[:2], twin[:2], strict=True):
            torch.testing.assert_close(tensor.cpu(), expected, **near)
        handed_on = rounded(found[0], dtype, "triton").repeat(2 if "guidance" in p.arrays else 1, 1, 1, 1)
        torch.testing.assert_close(found[2], handed_on, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("options", SPECIAL_OPTIONS)
def test_special_values_where_all_samples_are_in_one_row(options):
    """The form of the twin that a sampling loop without a GPU runs."""
    for name, p in special_problems(options):
        (x, output, coefficients, ids, base, offset), keywords = p.arguments()
        expected = step_torch(x, output, coefficients, ids, base, offset, **keywords, x_new=torch.empty_like(x))
        halves = len(output) // len(x)
        for i, row in enumerate(base.tolist()):
            own = {
                key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in keywords.items()
            }
            given = x[i : i + 1], output.view(halves, len(x), *output.shape[1:])[:, i]
            for rows in ((coefficients, ids), rows_on_host(coefficients, ids)):
                found = step_torch(*given, *rows, row, offset, **own, x_new=torch.empty(1, *x.shape[1:]))
                torch.testing.assert_close(found[0], expected[i], equal_nan=True, msg=name)


TINY = 2.0**-130  # a denormal of float32, and of bfloat16
# Each makes TINY of TINY and ones: coefficients by name, x, output (guided: both halves), what else is given.
DENORMALS = {
    "x": ({"c_x": 1}, TINY, 0, {}),
    "c_x": ({"c_x": TINY}, 1, 0, {}),
    "a": ({"a": TINY, "c_x0": 1}, 1, 0, {}),
    "c_x0": ({"a": 1, "c_x0": TINY}, 1, 0, {}),
    "b": ({"b": TINY, "c_x0": 1}, 0, 1, {}),
    "output": ({"b": 1, "c_x0": 1}, 0, TINY, {}),
    "c_out": ({"c_out": TINY}, 0, 1, {}),
    "z": ({"sigma": 1}, 0, 0, {"z": TINY}),
    "sigma": ({"sigma": TINY}, 0, 0, {"z": 1}),
    "clip": ({"a": 1, "c_x0": 1}, 1, 0, {"clip": TINY}),
    "bound": ({"a": 1, "c_x0": TINY}, 1, 0, {"bound": TINY}),
    "guidance": ({"b": 1, "c_x0": 1}, 0, (1, 0), {"guidance": TINY}),
    "conditional": ({"b": 1, "c_x0": 1}, 0, (TINY, 0), {"guidance": 1}),
    "unconditional": ({"b": 1, "c_x0": 1}, 0, (1, TINY), {"guidance": 0}),
    "known": ({"known_scale": 1}, 0, 0, {"known": TINY, "mask": 1}),
    "known_scale": ({"known_scale": TINY}, 0, 0, {"known": 1, "mask": 1}),
    "mask": ({"known_scale": 1}, 0, 0, {"known": 1, "mask": TINY}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DENORMALS)
def test_denormals_are_kept(name, backend, kernel_device):
    columns, x, output, given = DENORMALS[name]
    device, shape = device_of(backend, kernel_device), (1, 2, 3)
    table = torch.tensor([[columns.get(column, 0.0) for column in COLUMNS]], device=device)
    output = torch.tensor(output, device=device, dtype=torch.float32).view(-1, 1, 1).expand(-1, *shape[1:])
    options = {"seeds": torch.zeros(1, dtype=torch.int64, device=device)} if "known" in given else {}
    for option, value in given.items():
        size = (1,) if option in ("bound", "guidance") else shape
        options[option] = value if option == "clip" else torch.full(size, float(value), device=device)
    ids, base = (torch.zeros(1, *size, dtype=torch.int32, device=device) for size in ((2,), ()))
    found = step(torch.full(shape, float(x), device=device), output, table, ids, base, backend=backend, **options)
    assert torch.equal(found, torch.full_like(found, TINY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_denormals_of_the_output_are_kept(dtype, backend, kernel_device):
    if backend == "triton" and dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter takes denormals of bfloat16 for 0")
    device, tiny = device_of(backend, kernel_device), torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest
    table = torch.tensor([[1.0 if column == "c_out" else 0.0 for column in COLUMNS]], device=device)
    ids, base = (torch.zeros(1, *size, dtype=torch.int32, device=device) for size in ((2,), ()))
    x, output = torch.zeros(1, 2, 3, device=device), torch.full((1, 2, 3), tiny, dtype=dtype, device=device)
    model_input = torch.zeros_like(output)
    found = step(x, output, table, ids, base, backend=backend, model_input=model_input)
    assert torch.equal(found, torch.full_like(found, tiny))
    assert torch.equal(model_input, output)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_triton_is_the_twin(kernel_device, data):
    choose = {
        "noise": st.sampled_from(["none", "philox", "tensor"]),
        "limit": st.sampled_from(["none", "clip", "bound"]),
        "guided": st.booleans(),
        "inpaint": st.sampled_from(["none", "none", "bool", "soft"]),
        "learned": st.booleans(),
        "doubled": st.booleans(),
        "use_output": st.booleans(),
        "output_dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        "offset": st.integers(0, 4),
        "seed": st.integers(0, 2**32),
    }
    batch = data.draw(st.integers(1, STEPS), "batch")
    shape = batch, *data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), "shape")
    p = make(shape, **{name: data.draw(strategy, name) for name, strategy in choose.items()})
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "model_input")
    options = {name: data.draw(st.booleans(), name) for name in ("in_place", "channels_last")}
    options["layout"] = data.draw(st.sampled_from([None, *LAYOUTS.values()]), "layout")
    results = [launch(p, backend, kernel_device, input_dtype=dtype, **options) for backend in BACKENDS]
    _, _, new_bound, origin_bound = judge(p)
    (new, x0, _, timestep), (new_triton, x0_triton, _, timestep_triton) = results
    assert np.all(abs((new - new_triton.cpu()).double().numpy()) <= 2 * new_bound)
    assert np.all(abs((x0 - x0_triton.cpu()).double().numpy()) <= 2 * origin_bound)
    assert torch.equal(timestep, timestep_triton.cpu())
    for backend, (result, _, model_input, _) in zip(BACKENDS, results, strict=True):
        assert all(torch.equal(half, rounded(result, dtype, backend)) for half in model_input.split(batch))
