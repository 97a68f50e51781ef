"""OpenAI's diffusions on the engine: what their own code sampled, kept in tests/golden, and float64 arithmetic."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import accelerate
from ddpm_fast.adapters.guided_diffusion import MEANS, VARIANCES, space_timesteps
from tests.adapters import guided_standin
from tests.adapters.guided_standin import (
    SHAPE,
    GaussianDiffusion,
    ImprovedDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    network,
)
from tests.support.threads import check_seeds_of_threads

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guided_diffusion.npz")
CONTENT = json.loads(str(GOLDEN["content"]))
CASES = CONTENT["cases"]
PLAIN = {
    "mean": "EPSILON", "variance": "FIXED_LARGE", "eta": None, "clip": True, "schedule": "linear", "respacing": None,
    "rescale": False, "denoised": False, "cond": False, "library": "guided", "steps": 25,
}  # fmt: skip
ONE = torch.zeros(SHAPE[0])  # model_kwargs["y"]


def made(**changes):
    return guided_standin.make(guided_standin, {**PLAIN, **changes})


def name_of(case):
    return "-".join(str(case[key]) for key in ("mean", "variance", "eta", "clip", "schedule", "respacing", "cond"))


def relative(got, expected):
    expected = torch.as_tensor(expected)
    return (got - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def test_the_originals_are_named():
    assert set(CONTENT["commits"]) == {"guided-diffusion", "improved-diffusion"}
    assert all(len(bytes.fromhex(commit)) == 20 for commit in CONTENT["commits"].values())
    for mean in MEANS:
        for variance in VARIANCES:
            assert sum((case["mean"], case["variance"]) == (mean, variance) for case in CASES) >= 12


@pytest.mark.parametrize("number", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_samples_of_the_originals(number):
    case = CASES[number]
    fast = accelerate(guided_standin.make(guided_standin, case))
    sample = guided_standin.walk(fast, case)
    assert guided_standin.state_hash() == case["state"]
    assert relative(sample, GOLDEN["samples"][number]) < 2e-5
    states = guided_standin.walk(fast, case, progressive=True)
    assert len(states) == fast.num_timesteps
    assert torch.equal(states[-1]["sample"], sample)
    # Under guidance the library takes it through epsilon, which multiplies rounding by 1 / sqrt(alpha_bar).
    assert relative(states[fast.num_timesteps // 2]["pred_xstart"], GOLDEN["origins"][number]) < 5e-5


def test_a_thousand_steps_of_the_original():
    case = CASES[-1]
    assert case["steps"] == 1000
    assert case["respacing"] == ""
    fast = accelerate(guided_standin.make(guided_standin, case))
    error = np.abs(guided_standin.walk(fast, case).numpy() - GOLDEN["samples"][-1]).max()
    print(f"1000 steps: {error:.1e}")
    assert error < 5e-6


@pytest.mark.parametrize("total", sorted({steps for steps, *_ in CONTENT["spacings"]}))
def test_respacing(total):
    for steps, counts, expected in CONTENT["spacings"]:
        if steps == total and expected is None:
            with pytest.raises(ValueError, match="section_counts|no integer stride"):
                space_timesteps(steps, counts)
        elif steps == total:
            kept = sorted(space_timesteps(steps, counts))
            assert [len(kept), sum((i + 1) * t for i, t in enumerate(kept))] == expected


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_the_papers_in_float64(mean, variance, eta):
    """Written from alpha_bar alone: a second judge, also of networks with other wishes."""
    case = {**PLAIN, "mean": mean, "variance": variance, "eta": eta, "cond": True, "denoised": True, "rescale": True}
    theirs = made(**case)
    expected = guided_standin.walk(theirs, case)
    assert relative(guided_standin.walk(accelerate(theirs), case), expected) < 1e-4


def plain_network(x, t, y=None):
    return 0.8 * torch.sin(1.5 * x + 0.001 * t.view(-1, *(1,) * (x.dim() - 1)))


def both(call, theirs=None, **options):
    """What call gives for the stand-in and for the fast one."""
    theirs = theirs or made()
    results = []
    for one in (theirs, accelerate(theirs, **options)):
        torch.manual_seed(0)
        results.append(call(one))
    return results


def test_given_noise_of_any_strides():
    x_T = torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)
    a, b = both(lambda one: one.p_sample_loop(plain_network, SHAPE, noise=x_T, device="cpu"))
    assert relative(b, a) < 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 1, 1), (2, 3, 2, 4, 3)])
def test_any_rank(shape):
    a, b = both(lambda one: one.ddim_sample_loop(plain_network, shape, device="cpu", eta=0.5))
    assert a.shape == b.shape
    assert relative(b, a) < 1e-5


class Net(torch.nn.Module):
    """A module, in half precision inside; in float32 outside, as OpenAI's with use_fp16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1).bfloat16()

    def forward(self, x, t, y=None):
        assert x.dtype == torch.float32
        return self.conv(x.bfloat16()).float()


def test_networks_in_half_precision_are_fed_float32():
    net = Net()
    a, b = both(lambda one: one.p_sample_loop(net, SHAPE))
    assert relative(b, a) < 0.02  # a rounding of bfloat16 on the way in may fall on the other side


def test_the_device_is_the_networks():
    assert accelerate(made()).p_sample_loop(Net(), SHAPE).device.type == "cpu"
    with pytest.raises(ValueError, match="pass device="):
        accelerate(made()).p_sample_loop(plain_network, SHAPE)


@pytest.mark.parametrize("eta", [None, 0.5])
def test_classifier_guidance_takes_gradients(eta):
    def cond_fn(x, t, y=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad((-(x**2) / 2).sum(), x)[0]

    def call(one):
        walk = one.p_sample_loop if eta is None else lambda *args, **kwargs: one.ddim_sample_loop(*args, **kwargs)
        return walk(plain_network, SHAPE, cond_fn=cond_fn, device="cpu")

    a, b = both(call)
    assert relative(b, a) < 1e-5
    torch.manual_seed(0)
    assert not torch.allclose(b, accelerate(made()).p_sample_loop(plain_network, SHAPE, device="cpu"), atol=1e-3)


def test_what_the_caller_does_to_a_state_counts():
    """As in the library, where the yielded tensor is the walk's own."""
    fast = accelerate(made())
    plain, edited = [], []
    for states, edit in ((plain, False), (edited, True)):
        torch.manual_seed(0)
        for number, state in enumerate(fast.p_sample_loop_progressive(plain_network, SHAPE, device="cpu")):
            if edit and number == 10:
                state["sample"].mul_(0)
            states.append(state["sample"].clone())
    assert torch.equal(plain[9], edited[9])
    assert not edited[10].any()
    assert not torch.allclose(plain[11], edited[11])


def test_two_walks_at_once():
    fast = accelerate(made())
    torch.manual_seed(0)
    expected = fast.ddim_sample_loop(plain_network, SHAPE, device="cpu", noise=torch.ones(SHAPE))
    walk = fast.ddim_sample_loop_progressive(plain_network, SHAPE, device="cpu", noise=torch.ones(SHAPE))
    next(walk)
    fast.p_sample_loop(plain_network, SHAPE, device="cpu")
    *_, last = walk
    assert torch.equal(last["sample"], expected)


def test_progressive_walks_start_when_asked():
    fast = accelerate(made())
    before = torch.get_rng_state()
    fast.p_sample_loop_progressive(plain_network, SHAPE, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_philox_depends_on_the_sample_alone():
    fast = accelerate(made(), noise="philox")
    torch.manual_seed(1)
    four = fast.p_sample_loop(plain_network, (4, *SHAPE[1:]), device="cpu")
    assert len(set(fast.last_seeds)) == 4
    torch.manual_seed(1)
    assert torch.allclose(fast.p_sample_loop(plain_network, SHAPE, device="cpu"), four[:2], atol=1e-6)
    accelerate(made()).p_sample_loop(plain_network, SHAPE, device="cpu")
    torch.manual_seed(1)
    seeded = accelerate(made())
    seeded.p_sample_loop(plain_network, SHAPE, device="cpu")
    assert seeded.last_seeds is None


def test_every_thread_reads_the_seeds_of_its_own_last_call():
    fast = accelerate(made(), noise="philox")
    check_seeds_of_threads(fast, lambda: fast.p_sample_loop(plain_network, SHAPE, device="cpu"))


def test_several_steps_a_replay_draw_what_the_library_draws():
    a, b = both(lambda one: one.p_sample_loop(plain_network, SHAPE, device="cpu"), steps_per_replay=4)
    assert relative(b, a) < 1e-5


def test_the_original_is_left_alone():
    theirs = made(respacing="5,3,2", steps=50)
    before = copy.deepcopy(vars(theirs))
    fast = accelerate(theirs)
    fast.p_sample_loop(plain_network, SHAPE, device="cpu")
    assert vars(theirs).keys() == before.keys()
    for name, value in vars(theirs).items():
        assert np.array_equal(value, before[name])
    assert isinstance(fast, guided_standin.SpacedDiffusion)
    assert type(accelerate(fast)) is type(fast)


def test_copies_through_pickle():
    fast = accelerate(made(respacing="5,3,2", steps=50))
    torch.manual_seed(0)
    expected = fast.p_sample_loop(plain_network, SHAPE, device="cpu")
    for copied in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert type(copied) is type(fast)
        torch.manual_seed(0)
        assert torch.equal(copied.p_sample_loop(plain_network, SHAPE, device="cpu"), expected)


@pytest.mark.parametrize("kind", [GaussianDiffusion, ImprovedDiffusion])
def test_signatures_are_the_librarys(kind):
    theirs = kind(
        betas=made().betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )  # fmt: skip
    fast = accelerate(theirs)
    for name in ("p_sample_loop", "ddim_sample_loop"):
        assert inspect.signature(getattr(fast, name)) == inspect.signature(getattr(theirs, name))
        assert getattr(fast, name)(plain_network, SHAPE, None, True, None, device="cpu").shape == SHAPE


def test_the_loop_is_kept():
    fast = accelerate(made())
    call = lambda: fast.p_sample_loop(network(3), SHAPE, device="cpu", model_kwargs={"y": ONE})  # noqa: E731
    call()
    first = fast._runner.last_loop
    call()
    assert fast._runner.last_loop is not first  # another network
    one = network(3)
    kept = []
    for y in (ONE, ONE + 0.5):
        torch.manual_seed(0)
        kept.append(fast.p_sample_loop(one, SHAPE, device="cpu", model_kwargs={"y": y}))
        first = fast._runner.last_loop if len(kept) == 1 else first
    assert fast._runner.last_loop is first
    assert not torch.allclose(*kept)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"shape": 3}, TypeError, "shape must be a tuple"),
        ({"shape": (2,)}, TypeError, "shape must be a tuple"),
        ({"shape": (0, 3, 4, 4)}, ValueError, "every size in shape"),
        ({"model": None}, TypeError, "model must be callable"),
        ({"denoised_fn": 1}, TypeError, "denoised_fn must be callable"),
        ({"cond_fn": "guide"}, TypeError, "cond_fn must be callable"),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs must be a dict"),
        ({"noise": np.zeros(SHAPE)}, TypeError, "noise must be a tensor"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, ValueError, "noise must be"),
        ({"noise": torch.zeros(SHAPE).double()}, ValueError, "noise must be"),
        ({"model": lambda x, t: x[:, :2]}, ValueError, "the model must return"),
        ({"model": lambda x, t: torch.cat([x, x], 1)}, ValueError, "the model must return"),
        ({"denoised_fn": lambda x0: x0[:1]}, ValueError, "denoised_fn must return"),
        ({"strength": 1}, TypeError, "strength"),
    ],
)
def test_bad_calls(kwargs, error, message):
    with pytest.raises(error, match=message):
        accelerate(made()).p_sample_loop(**{"model": plain_network, "shape": SHAPE, "device": "cpu", **kwargs})


@pytest.mark.parametrize("eta", [-0.1, float("nan"), 5.0])
def test_bad_etas(eta):
    with pytest.raises(ValueError, match="eta"):
        accelerate(made()).ddim_sample_loop(plain_network, SHAPE, device="cpu", eta=eta)


def test_learned_variances_need_twice_the_channels():
    with pytest.raises(ValueError, match="the model must return"):
        accelerate(made(variance="LEARNED_RANGE")).p_sample_loop(plain_network, SHAPE, device="cpu")


def test_what_is_not_known_is_refused():
    class Own(GaussianDiffusion):
        def p_sample(self, *args, **kwargs):
            raise NotImplementedError

    class Other(Own):
        p_sample = None

        def _predict_xstart_from_eps(self, *args):
            raise NotImplementedError

        def p_mean_variance(self, *args):
            raise NotImplementedError

    arguments = {"betas": made().betas, "model_mean_type": ModelMeanType.EPSILON, "model_var_type": None}
    with pytest.raises(TypeError, match="accelerate knows"):
        accelerate(GaussianDiffusion(**arguments))
    arguments["model_var_type"] = ModelVarType.FIXED_SMALL
    with pytest.raises(TypeError, match="Other has a p_mean_variance of its own"):
        accelerate(Other(**arguments))
    patched = GaussianDiffusion(**arguments)
    patched.p_sample_loop = lambda *args: None
    with pytest.raises(TypeError, match="has a p_sample_loop of its own"):
        accelerate(patched)
    velocity = GaussianDiffusion(**{**arguments, "model_mean_type": LossType.MSE})
    with pytest.raises(ValueError, match="model_mean_type"):
        accelerate(velocity)
    for one in (GaussianDiffusion, made().betas, object()):
        with pytest.raises(TypeError, match="accelerate knows"):
            accelerate(one)


class Timed(torch.nn.Module):
    """Its time embedding takes a fraction of a timestep, as rescaled ones are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.conv = torch.nn.Linear(1, 3), torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, y=None):
        emb = torch.sin(self.time(t[:, None] / 300.0))[..., None, None]
        return torch.tanh(self.conv(x) + emb + (0 if y is None else y.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"y": ONE}], ids=["plain", "conditioned"])
def test_hoisted(rescale, kwargs):
    theirs, network = made(rescale=rescale, respacing="7"), Timed().eval()
    call = {"device": "cpu", "model_kwargs": kwargs}
    fast = accelerate(theirs, optimize="hoist", noise="library")
    images = []
    for one in (theirs, fast):
        torch.manual_seed(0)
        images.append(one.p_sample_loop(network, SHAPE, **call))
    assert fast._runner.last_loop.network.hoisted.counts.of_t >= 3
    assert torch.allclose(*images, atol=1e-5)
