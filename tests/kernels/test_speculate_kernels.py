"""The kernels of a speculative round against their PyTorch twins, and the twins against the textbook in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.kernels import philox, speculate
from ddpm_fast.kernels.dispatch import interpreting
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.kernels.rows import COLUMNS
from ddpm_fast.speculation.loop import SpeculativeLoop
from ddpm_fast.speculation.windows import WindowPlan
from ddpm_fast.table import Clipping, build_table

SHAPES = [(4, 1), (4, 2, 9), (3, 3, 8, 9), (2, 3, 31, 32)]
CONFIGS = {
    "ddpm": {},
    "ddim": {"sampler": "ddim", "eta": 0.8},
    "v": {"sampler": "ddim", "eta": 0.5, "prediction_type": "v_prediction"},
}
WIDTH, ROOM = 3, 4


class Round:
    """One round's buffers on a device, at random: samples in different rows, one of them past the end."""

    def __init__(self, shape, device, config="ddpm", limit="clip", guided=False, dtype=torch.float32, layout=None):
        generator = torch.Generator().manual_seed(math.prod(shape))
        batch, steps = shape[0], 20
        table = build_table(SamplerConfig(num_train_timesteps=steps, **CONFIGS[config]))

        def normal(*size):
            return torch.randn(size, generator=generator)

        self.device, self.batch, self.guided = device, batch, guided
        self.coefficients, self.ids = table.coefficients(), table.ids()
        self.windows = torch.tensor([3, 2, 1] * 7)[:steps].int()
        self.x = normal(*shape)
        # Guesses near to what the network will say, so that some drafts are accepted.
        self.guess = 0.1 * normal(batch, ROOM, *shape[1:])
        self.drafts, self.noise = (torch.zeros(batch, ROOM, *shape[1:]) for _ in range(2))
        rows = [0, steps, 11, steps - 2][:batch]
        self.position = torch.tensor([[row, 0, 3, 1 + place % 3, 0] for place, row in enumerate(rows)]).int()
        self.seeds = torch.tensor([5, 2**40 + 1, -3, 7])[:batch]
        halves = 2 if guided else 1
        self.model_input = torch.zeros(halves * batch * WIDTH, *shape[1:], dtype=dtype)
        self.timestep = torch.full((halves * batch * WIDTH,), -1)
        self.output = normal(halves * batch * WIDTH, *shape[1:]).to(dtype)
        if layout == "channels_last":
            self.model_input, self.output = (
                value.contiguous(memory_format=torch.channels_last) for value in (self.model_input, self.output)
            )
        self.limits = {"guidance": torch.linspace(0.5, 2, batch * WIDTH) if guided else None}
        if limit == "clip":
            self.limits["clip"] = 0.7
        if limit == "bound":
            self.limits["bound"] = torch.linspace(1, 1.5, batch * WIDTH)
        self.factor, self.rejected = torch.zeros(batch), torch.zeros(batch, steps, dtype=torch.uint8)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        self.limits = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.limits.items()}

    def run(self, backend):
        """The four operations; what they wrote."""
        draft, verify, decide, commit = speculate.implementation(backend)
        parts, sums = 1, torch.float64
        if backend == "triton":
            from ddpm_fast.kernels.speculate_triton import parts as count

            parts, sums = count(self.x[0].numel()), torch.float32
        self.dots = torch.zeros(self.batch, ROOM, parts, 2, dtype=sums, device=self.device)
        drafted = self.drafts, self.noise, self.guess
        table = self.windows, self.coefficients
        draft(
            self.x, self.guess, self.position, *table, self.ids, self.seeds, WIDTH, drafts=self.drafts,
            noise=self.noise, model_input=self.model_input, timestep=self.timestep,
        )  # fmt: skip
        shifted = self.guess.clone()
        verify(*drafted, self.output, self.position, *table, WIDTH, dots=self.dots, **self.limits)
        log_u = speculate.log_uniforms(self.seeds, self.ids)
        decide(self.dots, self.position, *table, log_u, WIDTH, factor=self.factor, rejected=self.rejected)
        commit(self.x, *drafted, self.output, self.position, self.factor, *table, WIDTH, **self.limits)
        found = {name: getattr(self, name).cpu() for name in (
            "x", "guess", "drafts", "noise", "model_input", "timestep", "position", "factor", "rejected"
        )}  # fmt: skip
        return {**found, "shifted": shifted.cpu(), "dots": self.dots.sum(2).cpu()}


def valid(found, steps=20):
    """Which drafts count: bool [B, ROOM]."""
    return torch.arange(ROOM) < found["position"][:, Position.EVALUATED, None]


FORMS = [
    {},
    {"config": "ddim"},
    {"config": "v", "limit": None},
    {"limit": "bound"},
    {"guided": True},
    {"guided": True, "limit": "bound", "config": "ddim"},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize(
    ("shape", "form"),
    [*((shape, FORMS[0]) for shape in SHAPES), *((SHAPES[1], form) for form in FORMS[1:]), (SHAPES[2], FORMS[5])],
    ids=str,
)
def test_kernels_and_twins_agree(shape, form, kernel_device):
    twin = Round(shape, torch.device("cpu"), **form).run("torch")
    found = Round(shape, kernel_device, **form).run("triton")
    assert torch.equal(found["position"], twin["position"])
    assert torch.equal(found["rejected"], twin["rejected"])
    kept = valid(twin)
    tolerance = {"rtol": 1e-3, "atol": 2e-3} if not interpreting() else {"rtol": 2e-5, "atol": 2e-5}
    for name in ("drafts", "noise", "guess", "shifted", "dots"):
        torch.testing.assert_close(found[name][kept].double(), twin[name][kept].double(), **tolerance)
    torch.testing.assert_close(found["x"], twin["x"], **tolerance)
    torch.testing.assert_close(found["factor"], twin["factor"], **tolerance)
    rows = kept[:, :WIDTH].flatten().repeat(2 if form.get("guided") else 1)
    assert torch.equal(found["timestep"][rows], twin["timestep"][rows])
    close = {"rtol": 1e-2, "atol": 1e-2} if form.get("dtype") else tolerance
    torch.testing.assert_close(found["model_input"][rows], twin["model_input"][rows], **close)


SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e-42)
SPECIAL_FORMS = [{}, {"limit": "bound", "guided": True}, {"config": "ddim"}, {"limit": None}]
SPECIAL_NAMES = ["output", "x", "guess", *(f"coefficients:{column}" for column in range(6))]


def with_special_values(problem, name):
    """Put each special value into another sample: into one element of it, or into its numbers."""
    values = torch.tensor(SPECIAL, device=problem.device)
    if name.startswith("coefficients"):
        rows = torch.tensor([0, 1, 11, 18], device=problem.device)  # drafted by the first, the third and the last
        problem.coefficients[rows, int(name.partition(":")[2])] = values
        return
    target = problem.limits[name] if name in problem.limits else getattr(problem, name)
    flat = target.view(len(target), -1)
    flat[: len(values), 0] = values
    if name == "output":
        flat[WIDTH : WIDTH + len(values), 5] = values
    elif len(target) == problem.batch * WIDTH:
        flat[:, 0] = values.repeat(WIDTH)


@pytest.mark.parametrize(
    ("form", "use_output", "name"),
    [
        *itertools.product(SPECIAL_FORMS, [True], SPECIAL_NAMES),
        *itertools.product(SPECIAL_FORMS[:1], [False], SPECIAL_NAMES),
        *itertools.product(SPECIAL_FORMS[1:2], [True], ["bound", "guidance"]),
        ({"dtype": torch.bfloat16}, True, "output"),
    ],
    ids=str,
)
def test_special_values(name, form, use_output, kernel_device):
    """NaN, infinity and denormals: the same drafts, decisions and states from kernels and twins."""
    found = []
    for backend, device in (("torch", torch.device("cpu")), ("triton", kernel_device)):
        problem = Round((4, 2, 3, 4), device, **form)
        problem.limits["use_output"] = use_output
        with_special_values(problem, name)
        found.append(problem.run(backend))
    twin, kernel = found
    assert torch.equal(kernel["position"], twin["position"])
    assert torch.equal(kernel["rejected"], twin["rejected"])
    kept = valid(twin)
    tolerance = {"rtol": 1e-3, "atol": 2e-3, "equal_nan": True}
    for key in ("drafts", "noise", "guess", "shifted"):
        torch.testing.assert_close(kernel[key][kept], twin[key][kept], **tolerance)
    for key in ("x", "factor"):
        torch.testing.assert_close(kernel[key], twin[key], **tolerance)
    rows = kept[:, :WIDTH].flatten().repeat(2 if form.get("guided") else 1)
    near = {"rtol": 1e-2, "atol": 1e-2} if "dtype" in form else {}
    torch.testing.assert_close(kernel["model_input"][rows], twin["model_input"][rows], **tolerance | near)


def test_decisions_on_special_values(kernel_device):
    """Every pair of special values as D z and |D|^2, and as log u, of a draft that is not the last."""
    values = torch.tensor([*SPECIAL, 3e38, -3e38, 0.5, 0.0])
    pairs = torch.cartesian_prod(values, values, torch.tensor([*SPECIAL, -0.5]))
    batch, steps = len(pairs), 20
    coefficients = build_table(SamplerConfig(num_train_timesteps=steps)).coefficients()
    coefficients[0, 0] = torch.inf  # a, as of a schedule that ends without signal: no decision depends on it
    found = []
    for backend, device in (("torch", torch.device("cpu")), ("triton", kernel_device)):
        dots = torch.full((batch, ROOM, 1, 2), 0.25)
        dots[:, 1, 0], log_u = pairs[:, :2], torch.full((batch, steps), -3.0)
        log_u[:, 1] = pairs[:, 2]
        position = torch.tensor([[0, 0, 3, 1, 0]] * batch).int()
        table = torch.full((steps,), 3).int(), coefficients
        given = [tensor.to(device) for tensor in (dots, position, *table, log_u)]
        factor = torch.zeros(batch, device=device)
        rejected = torch.zeros(batch, steps, dtype=torch.uint8, device=device)
        speculate.implementation(backend)[2](*given, WIDTH, factor=factor, rejected=rejected)
        found.append([tensor.cpu() for tensor in (given[1], rejected, factor)])
    for twin, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, twin, equal_nan=True, rtol=1e-6, atol=0)
    taken = found[0][0][:, Position.TAKEN]
    assert set(taken.tolist()) == {2, 3}
    assert (taken[pairs.isnan().any(1)] == 2).all()  # what cannot be compared is not accepted


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_denormals_are_kept(backend, kernel_device):
    """A plain step is linear in state and output: with both scaled down, so is the result."""
    found = []
    for scale in (1.0, 2.0**-130):
        problem = Round((4, 2, 3, 4), kernel_device if backend == "triton" else torch.device("cpu"), limit=None)
        problem.coefficients[:, COLUMNS.index("sigma")] = 0
        for values in (problem.x, problem.output, problem.guess):
            values *= scale
        found.append(problem.run(backend))
    plain, scaled = found
    assert (plain["position"][[0, 2, 3], Position.OUTCOME] == Outcome.PLAIN).all()
    for name in ("x", "guess", "drafts", "shifted"):
        torch.testing.assert_close(scaled[name] * 2.0**65 * 2.0**65, plain[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_infinite_output_is_clipped(backend, kernel_device):
    """Where the output enters a step through the x0 prediction alone, infinity is the same as a large number."""
    found = []
    for value in (torch.inf, 1e30):
        problem = Round((4, 2, 3, 4), kernel_device if backend == "triton" else torch.device("cpu"))
        problem.limits["use_output"] = False
        problem.output[::2, 0, 1, 1] = value
        found.append(problem.run(backend))
    for name in ("x", "guess", "position", "factor", "rejected"):
        torch.testing.assert_close(found[0][name], found[1][name])
    assert found[0]["x"].isfinite().all()


def test_channels_last(kernel_device):
    shape = (2, 3, 6, 5)
    twin = Round(shape, torch.device("cpu")).run("torch")
    found = Round(shape, kernel_device, layout="channels_last").run("triton")
    kept = valid(twin)
    assert torch.equal(found["position"], twin["position"])
    torch.testing.assert_close(found["x"], twin["x"], rtol=1e-3, atol=2e-3)
    rows = kept[:, :WIDTH].flatten()
    torch.testing.assert_close(found["model_input"][rows], twin["model_input"][rows], rtol=1e-3, atol=2e-3)


def textbook(problem, row, x, guess, output, seed):
    """One sample's round in float64, as the paper writes it: the new state, how many steps, how it ended."""
    table = problem.coefficients.double()
    ids = problem.ids
    count = min(int(problem.windows[row]), WIDTH, len(table) - row)
    ys, zs, means = [x], [], []
    for k in range(count):
        a, b, c_x0, c_x, c_out, sigma = table[row + k, :6]
        z = philox.normals(seed[None], ids[row + k, 1:], philox.Stream.STEP, x.numel(), dtype=torch.float64)
        zs.append(z.view(x.shape))
        mean = c_x0 * guess[k] + c_x * ys[k] + c_out * (guess[k] - a * ys[k]) / b
        means.append(mean)
        ys.append(mean + sigma * zs[k])
    for k in range(count):
        a, b, c_x0, c_x, c_out, sigma = table[row + k, :6]
        out = output[k]
        origin = (a * ys[k] + b * out).clamp(-0.7, 0.7)
        mean = c_x0 * origin + c_x * ys[k] + c_out * out
        if sigma == 0 or count == 1:
            return mean + sigma * zs[k], k + 1, Outcome.PLAIN
        distance = (mean - means[k]) / sigma
        key = int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF
        word = philox.philox_4x32((0, int(ids[row + k, 1]), int(philox.Stream.ACCEPT), 0), key)[0]
        u = float(philox.uniform(torch.tensor([word])))
        along = float((distance * zs[k]).sum())
        if math.log(u) > along - float(distance.square().sum()) / 2:
            reflected = zs[k] - 2 * along * distance / distance.square().sum()
            return mean + sigma * reflected, k + 1, Outcome.REJECTED
    return ys[count], count, Outcome.ACCEPTED


@pytest.mark.parametrize("config", ["ddpm", "ddim"])
@pytest.mark.parametrize("shape", [(4, 1), (3, 3, 8, 9)], ids=str)
def test_the_twin_is_the_textbook(shape, config):
    seen = set()
    for near in (0.02, 0.3, 1.0):
        problem = Round(shape, torch.device("cpu"), config)
        before = problem.position.clone()
        x, guess = problem.x.double(), problem.guess.double()
        # An output that says what the guesses say, and a little else.
        problem.output *= near
        found = problem.run("torch")
        for place in range(shape[0]):
            row, taken = int(before[place, Position.ROW]), int(before[place, Position.TAKEN])
            if row >= 20:
                assert torch.equal(found["x"][place].double(), x[place])
                assert found["position"][place].tolist() == [20, 20, 0, 0, Outcome.DONE]
                continue
            shifted = [guess[place, min(taken + k, 2)] for k in range(ROOM)]
            output = problem.output.view(shape[0], WIDTH, *shape[1:])[place].double()
            new, steps, outcome = textbook(problem, row, x[place], shifted, output, problem.seeds[place])
            assert found["position"][place, [Position.ROW, Position.TAKEN, Position.OUTCOME]].tolist() == [
                row + steps, steps, outcome,
            ]  # fmt: skip
            torch.testing.assert_close(found["x"][place].double(), new, rtol=1e-4, atol=1e-4)
            seen.add(outcome)
    assert seen >= {Outcome.PLAIN, Outcome.REJECTED}


@pytest.mark.parametrize("guided", [False, True])
def test_whole_walks(guided, kernel_device):
    """The loop on the kernels and on their twins: the same rounds, the same samples."""
    shape, found = (2, 1, 4, 4), {}
    table = build_table(SamplerConfig(num_train_timesteps=30))
    for backend, device in (("torch", torch.device("cpu")), ("triton", kernel_device)):
        call = Call.of(
            lambda x, t: 0.4 * x * (1 + t.view(-1, 1, 1, 1) / 100), shape, device=device,
            guidance_scale=[1.0, 2.0] if guided else None, uncond_kwargs={} if guided else None,
        )  # fmt: skip
        plan, execution = WindowPlan.of({0: 2, 10: 4, 20: 8}), Execution(backend=backend, optimize=None)
        loop = SpeculativeLoop(call, table, Clipping(1.0), plan, execution=execution)
        x = loop.run(PhiloxNoise([3, 4], shape, table, device, backend), progress=False)
        found[backend] = x.cpu(), loop.speculation
    (x, did), (expected, expected_did) = found["triton"], found["torch"]
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=2e-3)
    assert did.windows == expected_did.windows
    np.testing.assert_array_equal(did.acceptance, expected_did.acceptance)
