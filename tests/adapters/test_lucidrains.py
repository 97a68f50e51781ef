"""lucidrains' diffusions on the engine: the library's images from the library's seeds, and the same generator state."""

import copy
import importlib
import inspect
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import (
    GaussianDiffusion,
    GaussianDiffusion1D,
    LearnedGaussianDiffusion,
    Trainer,
    Trainer1D,
    XMWrapper,
)
from ema_pytorch import EMA

from ddpm_fast import accelerate
from ddpm_fast.adapters.lucidrains import load_trainer_checkpoint
from tests.adapters.lucidrains_models import (
    OBJECTIVES,
    Halved,
    both,
    calm,
    difference,
    diffusion,
    diffusion_1d,
    learned,
    unet,
    unet_1d,
)
from tests.support.threads import check_seeds_of_threads

ETAS = [None, 0.0, 0.5, 1.0]  # None: DDPM
TIGHT = 1e-5


def steps(eta):
    return {} if eta is None else {"sampling_timesteps": 7, "ddim_sampling_eta": eta}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_images_are_the_librarys(objective, schedule, eta, self_condition):
    theirs = calm(objective, self_condition, beta_schedule=schedule, **steps(eta))
    assert difference(theirs, lambda one: one.sample(2)) < TIGHT


def test_a_thousand_steps():
    theirs = diffusion(objective="pred_noise", timesteps=1000)
    error = difference(theirs, lambda one: one.sample(2))
    print(f"1000 steps: {error:.1e}")
    assert error < TIGHT


@pytest.mark.parametrize("eta", [None, 0.5])
def test_every_state_on_the_way(eta):
    theirs = calm(image_size=(8, 12), **steps(eta))
    (a, b), _ = both(theirs, lambda one: one.sample(2, return_all_timesteps=True))
    assert a.shape == b.shape == (2, 26 if eta is None else 8, 3, 8, 12)
    assert torch.equal(a[:, 0], b[:, 0])
    assert difference(theirs, lambda one: one.sample(2, True)) < TIGHT


@pytest.mark.parametrize("call", ["p_sample_loop", "ddim_sample"])
def test_shapes_are_the_callers(call):
    theirs = calm(sampling_timesteps=7)
    assert difference(theirs, lambda one: getattr(one, call)((3, 3, 16, 8))) < TIGHT


def test_all_timesteps_by_ddim():
    assert difference(calm(ddim_sampling_eta=1.0), lambda one: one.ddim_sample((2, 3, 8, 8))) < TIGHT


def test_one_step():
    assert difference(calm("pred_v", sampling_timesteps=1), lambda one: one.sample(2)) < TIGHT


def test_without_normalisation():
    theirs = calm(auto_normalize=False)
    assert difference(theirs, lambda one: one.sample(2)) < TIGHT
    assert accelerate(theirs).sample(4).min() < -0.1


def test_alpha_bar_may_be_0_where_the_library_can_start_from_it():
    assert difference(calm("pred_v", timesteps=20, beta_schedule="linear"), lambda one: one.sample(2)) < TIGHT
    with pytest.raises(ValueError, match="alpha_bar is 0"):
        accelerate(calm("pred_noise", timesteps=20, beta_schedule="linear")).sample(2)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("t", [None, 24, 7, 1, 0])
def test_interpolation(t, self_condition):
    x1, x2 = torch.rand(2, 2, 3, 8, 8)
    theirs = calm(self_condition=self_condition)
    assert difference(theirs, lambda one: one.interpolate(x1, x2, t, lam=0.3)) < TIGHT


def test_interpolation_of_an_immiscible_diffusion():
    x1, x2 = torch.rand(2, 4, 3, 8, 8)
    assert difference(calm(immiscible=True), lambda one: one.interpolate(x1, x2, 7)) < TIGHT


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_learned_variance(objective):
    theirs = learned(objective=objective)
    assert difference(theirs, lambda one: one.sample(2)) < TIGHT
    x1, x2 = torch.rand(2, 2, 3, 8, 8)
    assert difference(theirs, lambda one: one.interpolate(x1, x2, 7)) < TIGHT


def test_a_network_with_learned_variance_is_called_without_a_condition():
    theirs = learned()
    inner = theirs.model.forward
    theirs.model.forward = lambda x, t: inner(x, t)
    assert difference(theirs, lambda one: one.sample(2)) < TIGHT


def test_a_learned_variance_has_no_ddim():
    theirs = learned(objective="pred_noise", sampling_timesteps=5)
    with pytest.raises(NameError):
        theirs.sample(1)
    with pytest.raises(NotImplementedError, match="cannot sample by DDIM"):
        accelerate(theirs).sample(1)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sequences(objective, eta, self_condition):
    theirs = diffusion_1d(unet_1d(self_condition), objective=objective, **steps(eta))
    assert difference(theirs, lambda one: one.sample(2)) < 1e-4
    x1, x2 = torch.rand(2, 2, 3, 16)
    assert difference(theirs, lambda one: one.interpolate(x1, x2, 5)) < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sequences_unclipped(objective):
    theirs = diffusion_1d(objective=objective, sampling_timesteps=7, ddim_sampling_eta=0.5, beta_schedule="linear")
    with torch.no_grad():
        theirs.model.final_conv.weight.mul_(4)
    (a, b), _ = both(theirs, lambda one: one.ddim_sample((2, 3, 16), clip_denoised=False))
    assert a.abs().max() > 1.1
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


class Scaled(torch.nn.Module):
    """A network of sequences [B, N, C] with an argument."""

    self_condition = False
    channels = 3

    def __init__(self):
        super().__init__()
        self.net = unet_1d()

    def forward(self, x, t, scale=None):
        return self.net(x.transpose(1, 2), t).transpose(1, 2) * (1 if scale is None else scale)


@pytest.mark.parametrize("eta", [None, 0.5])
def test_sequences_with_channels_last_and_arguments(eta):
    theirs = diffusion_1d(Scaled(), channel_first=False, auto_normalize=False, **steps(eta))
    kwargs = {"scale": torch.tensor([0.5, 0.9]).view(2, 1, 1)}
    call = lambda one: one.sample(2, model_forward_kwargs=kwargs)  # noqa: E731
    assert both(theirs, call)[0][1].shape == (2, 16, 3)
    assert difference(theirs, call) < TIGHT
    fast = accelerate(theirs)
    plain = fast.sample(2)
    torch.manual_seed(0)
    assert not torch.equal(plain, fast.sample(2, model_forward_kwargs=kwargs))


def test_sequences_with_their_noise():
    ((a, x_T), (b, ours)), _ = both(diffusion_1d(), lambda one: one.sample(2, return_noise=True))
    assert torch.equal(x_T, ours)
    assert (a - b).abs().max() < TIGHT
    ((a, last), (b, ours)), _ = both(diffusion_1d(sampling_timesteps=7), lambda one: one.sample(2, return_noise=True))
    assert torch.equal(x_T, ours)
    assert not torch.equal(last, ours)  # the library's is the noise of its last step, eta 0 or not
    assert (a - b).abs().max() < TIGHT


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_is_no_further_from_float32(objective):
    exact = diffusion(objective=objective)
    torch.manual_seed(0)
    expected = exact.sample(16)
    (theirs, ours), _ = both(diffusion(Halved(), objective=objective), lambda one: one.sample(16))

    def autocast(one):
        with torch.autocast("cpu", torch.bfloat16):
            return one.sample(16)

    pairs = {"bfloat16 weights": (theirs, ours), "autocast": tuple(both(exact, autocast)[0])}
    for name, images in pairs.items():
        a, b = ((image - expected).square().mean().sqrt().item() for image in images)
        print(f"{objective}, {name}: library {a:.5f}, ours {b:.5f}")
        assert 0 < b <= 1.1 * a  # the library's state is float32, too: equal but for what rounding does


def test_the_original_is_left_alone():
    theirs = calm(self_condition=True)
    before, weights = dict(vars(theirs)), copy.deepcopy(theirs.state_dict())
    fast = accelerate(theirs)
    fast.sample(2)
    fast.interpolate(*torch.rand(2, 2, 3, 8, 8), 3)
    assert vars(theirs).keys() == before.keys()
    assert all(vars(theirs)[name] is value for name, value in before.items())
    assert type(theirs) is GaussianDiffusion
    assert all(torch.equal(value, weights[name]) for name, value in theirs.state_dict().items())
    assert isinstance(fast, GaussianDiffusion)
    assert fast.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("made", [diffusion, learned, diffusion_1d])
def test_signatures_are_the_librarys(made):
    theirs = made(objective="pred_noise")
    fast = accelerate(theirs)
    for name in ("sample", "p_sample_loop", "ddim_sample", "interpolate"):
        expected, got = (inspect.signature(getattr(one, name)).parameters for one in (theirs, fast))
        assert list(got) == list(expected)
        for parameter in got.values():
            assert (parameter.default or None) == (expected[parameter.name].default or None)


def test_training_copies_and_accelerating_again():
    fast = accelerate(diffusion(unet()))
    fast(torch.rand(2, 3, 8, 8)).backward()
    assert fast.sample(1).requires_grad is False
    assert type(accelerate(fast)) is type(fast)
    torch.manual_seed(0)
    expected = fast.sample(2)
    torch.manual_seed(0)
    assert torch.equal(EMA(fast).ema_model.sample(2), expected)


@pytest.mark.parametrize("made", [diffusion, learned, diffusion_1d])
def test_copies(made):
    fast = accelerate(made(objective="pred_noise"))
    torch.manual_seed(0)
    expected = fast.sample(2)
    copies = [copy.deepcopy(fast)]
    if made is diffusion_1d:  # the library's Unet cannot be pickled, its Unet1D can
        copies.append(pickle.loads(pickle.dumps(fast)))
    for copied in copies:
        assert type(copied) is type(fast)
        assert copied.model is not fast.model
        torch.manual_seed(0)
        assert torch.equal(copied.sample(2), expected)


def test_networks_trained_between_two_walks():
    theirs = diffusion(unet())
    fast = accelerate(theirs)
    fast.sample(2)
    with torch.no_grad():
        theirs.model.final_conv.bias.add_(0.5)
    torch.manual_seed(0)
    expected = theirs.sample(2)
    torch.manual_seed(0)
    assert (fast.sample(2) - expected).abs().max() < TIGHT


def test_the_loop_is_kept():
    fast = accelerate(calm(self_condition=True))
    torch.manual_seed(0)
    first = fast.sample(2)
    loop = fast._runner.last_loop
    torch.manual_seed(0)
    assert torch.equal(fast.sample(2), first)
    assert fast._runner.last_loop is loop
    fast.sample(3)
    assert fast._runner.last_loop is not loop


def test_philox_depends_on_the_sample_alone():
    fast = accelerate(calm(), noise="philox")
    torch.manual_seed(0)
    four = fast.sample(4)
    seeds = fast.last_seeds
    torch.manual_seed(0)
    two = fast.sample(2)
    assert len(seeds) == 4
    assert fast.last_seeds == seeds[:2]
    assert (four[:2] - two).abs().max() < TIGHT


def test_every_thread_reads_the_seeds_of_its_own_last_call():
    fast = accelerate(calm(), noise="philox")
    check_seeds_of_threads(fast, lambda: fast.sample(2))


def test_without_a_seed_noise_is_philox():
    fast = accelerate(calm())
    fast.sample(1)
    assert fast.last_seeds is None
    torch.seed()
    fast.sample(1)
    assert len(fast.last_seeds) == 1
    library = accelerate(calm(), noise="library")
    library.sample(1)
    assert library.last_seeds is None


def test_progress_has_the_librarys_labels(monkeypatch):
    labels = []
    real = importlib.import_module("ddpm_fast.engine.progress").tqdm
    monkeypatch.setattr(
        "ddpm_fast.engine.progress.tqdm", lambda **kwargs: labels.append(kwargs["desc"]) or real(**kwargs)
    )
    fast = accelerate(calm())
    fast.sample(1)
    fast.interpolate(*torch.rand(2, 1, 3, 8, 8))
    assert labels == ["sampling loop time step", "interpolation sample time step"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.sample(0), "batch_size must be an integer >= 1, got 0"),
        (lambda one: one.sample(2.0), "batch_size must be an integer"),
        (lambda one: one.p_sample_loop((2, 3, 0, 8)), "every size in shape must be an integer >= 1"),
        (lambda one: one.ddim_sample((2,)), r"shape must be \(batch, channels, ...\)"),
        (lambda one: one.interpolate(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)), "must have one shape"),
        (lambda one: one.interpolate(*torch.zeros(2, 1, 3, 8, 8), 25), r"t must be an integer in \[0, 24\], got 25"),
        (lambda one: one.interpolate(*torch.zeros(2, 1, 3, 8, 8), -1), "t must be an integer"),
    ],
)
def test_bad_calls(call, message):
    fast = accelerate(diffusion())
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        call(fast)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_settings():
    with pytest.raises(ValueError, match="ddim_sampling_eta must leave room"):
        accelerate(diffusion(sampling_timesteps=5, ddim_sampling_eta=3.0)).sample(1)
    with pytest.raises(ValueError, match="x_self_cond comes from the walk"):
        accelerate(diffusion_1d(unet_1d(True))).sample(1, model_forward_kwargs={"x_self_cond": torch.zeros(1, 3, 16)})


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("continuous_time_gaussian_diffusion", "ContinuousTimeGaussianDiffusion", "log-SNR"),
        ("v_param_continuous_time_gaussian_diffusion", "VParamContinuousTimeGaussianDiffusion", "log-SNR"),
        ("simple_diffusion", "GaussianDiffusion", "log-SNR"),
        ("weighted_objective_gaussian_diffusion", "WeightedObjectiveGaussianDiffusion", "mixes two predictions"),
        ("elucidated_diffusion", "ElucidatedDiffusion", "Heun"),
        ("classifier_free_guidance", "GaussianDiffusion", "forward_with_cond_scale"),
        ("repaint", "GaussianDiffusion", "back and forth"),
        ("guided_diffusion", "GaussianDiffusion", "gradients"),
    ],
)
def test_other_diffusions_are_refused(module, name, reason, monkeypatch):
    # repaint's import reaches a network of torchvision
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch.fid_evaluation", SimpleNamespace(FIDEvaluation=None))
    kind = getattr(importlib.import_module(f"denoising_diffusion_pytorch.{module}"), name)
    for cls in (kind, type("Own", (kind,), {})):
        with pytest.raises(TypeError, match=rf"{module}\.{name} is not supported: .*{reason}"):
            accelerate(cls.__new__(cls))


@pytest.mark.parametrize("made", [unet, lambda: XMWrapper.__new__(XMWrapper)])
def test_what_is_no_diffusion_is_refused(made):
    with pytest.raises(TypeError, match="accelerate knows"):
        accelerate(made())


@pytest.mark.parametrize("base", [GaussianDiffusion, LearnedGaussianDiffusion, GaussianDiffusion1D])
@pytest.mark.parametrize("name", ["p_sample", "sample", "model_predictions", "q_posterior", "interpolate"])
def test_own_sampling_methods_are_refused(base, name):
    cls = type("Own", (base,), {name: lambda self: None})
    with pytest.raises(TypeError, match=f"Own has a {name} of its own"):
        accelerate(cls.__new__(cls))


def test_patched_objects_are_refused_and_other_subclasses_are_not():
    patched = diffusion()
    patched.p_sample = lambda *args: None
    with pytest.raises(TypeError, match="has a p_sample of its own"):
        accelerate(patched)

    class Own(GaussianDiffusion):
        def p_losses(self, *args, **kwargs):
            return 1.0

    fast = accelerate(Own(unet(), image_size=8, timesteps=25))
    assert isinstance(fast, Own)
    assert fast.sample(1).shape == (1, 3, 8, 8)


def saved(trainer, theirs, folder):
    """What a Trainer writes, by its own save; the averaged weights differ from the last ones."""
    ema = EMA(theirs, beta=0.9, update_every=1, update_after_step=0)
    for _ in range(4):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.01)
        ema.update()
    accelerator = SimpleNamespace(is_local_main_process=True, get_state_dict=lambda m: m.state_dict(), scaler=None)
    state = SimpleNamespace(
        accelerator=accelerator, model=theirs, ema=ema, step=4, results_folder=folder,
        opt=torch.optim.Adam(theirs.parameters()),
    )  # fmt: skip
    trainer.save(state, 1)
    return folder / "model-1.pt", ema.ema_model


@pytest.mark.parametrize(("trainer", "made"), [(Trainer, diffusion), (Trainer, learned), (Trainer1D, diffusion_1d)])
def test_a_trainers_checkpoint(trainer, made, tmp_path):
    online = made(objective="pred_noise")
    path, averaged = saved(trainer, online, tmp_path)
    for ema, expected in ((True, averaged), (False, online)):
        fresh = accelerate(made(objective="pred_noise"))
        assert load_trainer_checkpoint(path, fresh, ema=ema) is fresh
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in expected.state_dict().items())
    assert not torch.equal(next(averaged.parameters()), next(online.parameters()))


def test_checkpoints_that_do_not_fit(tmp_path):
    path, _ = saved(Trainer, diffusion(unet()), tmp_path)
    other = diffusion(unet(channels=1))
    weights = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"is of another diffusion: model\..* must have shape"):
        load_trainer_checkpoint(path, other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in weights.items())
    with pytest.raises(ValueError, match="it lacks model"):
        load_trainer_checkpoint(path, diffusion_1d(), ema=False)
    with pytest.raises(FileNotFoundError):
        load_trainer_checkpoint(tmp_path / "model-9.pt", other)
    for number, content in enumerate(({"weights": {}}, {"ema": 3}, [1])):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match=r"is no checkpoint of a Trainer: it has no 'ema'"):
            load_trainer_checkpoint(tmp_path / f"{number}.pt", other)
    for content in (b"", b"hello", b"\x80\x02", b"PK\x03\x04"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="torch.load cannot read it"):
            load_trainer_checkpoint(tmp_path / "bad.pt", other)
