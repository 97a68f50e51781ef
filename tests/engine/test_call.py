"""The call of a model: what it checks, and the calls for other batches that are made from it."""

import pytest
import torch
from torch import nn

from ddpm_fast.engine.call import Call
from ddpm_fast.engine.network import Network
from ddpm_fast.sample import Sampler

SHAPE = (3, 2, 4)


def model(x, t, **kwargs):
    return x


def guided(**changes):
    labels, none = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0])
    options = {"model_kwargs": {"y": labels}, "uncond_kwargs": {"y": none}, "guidance_scale": [1.0, 2.0, 3.0]}
    return Call.of(model, SHAPE, **{**options, **changes})


def test_the_conditional_half_comes_first():
    call = guided()
    assert call.guided
    assert call.input_shape == (6, 2, 4)
    assert call.keywords()["y"].tolist() == [1, 2, 3, 0, 0, 0]


def test_the_call_for_the_first_sample():
    call = guided().first()
    assert call.shape == (1, 2, 4)
    assert (call.guidance.tolist(), call.keywords()["y"].tolist()) == ([1.0], [1, 0])
    kwargs = {"y": torch.tensor([1, 2, 3]), "shared": torch.ones(5), "scale": 2.5}
    first = Call.of(model, SHAPE, model_kwargs=kwargs).first().kwargs
    assert (first["y"].tolist(), first["shared"].tolist(), first["scale"]) == ([1], [1.0] * 5, 2.5)


def test_copies_of_a_sample_lie_side_by_side():
    call = guided().repeated(2)
    assert call.shape == (6, 2, 4)
    assert call.guidance.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert call.keywords()["y"].tolist() == [1, 1, 2, 2, 3, 3] + [0] * 6


def test_tensors_inside_containers_follow_their_samples():
    both = {"text": torch.arange(3.0), "scale": 2}
    call = Call.of(model, SHAPE, model_kwargs={"added": both}, uncond_kwargs={"added": both}, guidance_scale=2.0)
    wide = call.repeated(2)
    assert wide.kwargs["added"]["text"].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert wide.keywords()["added"]["text"].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0] * 2  # for both halves
    assert call.first().kwargs["added"] == {"text": torch.tensor([0.0]), "scale": 2}


def test_later_changes_of_the_callers_tensors_do_not_count():
    labels = torch.tensor([1, 2, 3])
    call = Call.of(model, SHAPE, model_kwargs={"y": labels})
    labels.zero_()
    assert call.keywords()["y"].tolist() == [1, 2, 3]
    network = Network(call)
    network.kwargs["y"].zero_()
    assert call.keywords()["y"].tolist() == [1, 2, 3]  # buffers are copies, too


def test_new_keywords():
    call = guided().with_kwargs({"y": torch.tensor([4, 5, 6])}, {"y": torch.tensor([7, 7, 7])})
    assert call.keywords()["y"].tolist() == [4, 5, 6, 7, 7, 7]
    with pytest.raises(ValueError, match="belong to guidance"):
        Call.of(model, SHAPE).with_kwargs({}, {})
    with pytest.raises(ValueError, match="must have the names of model_kwargs"):
        guided().with_kwargs({"y": torch.tensor([4, 5, 6])}, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_scale": None}, "guidance_scale and uncond_kwargs belong together"),
        ({"uncond_kwargs": {}}, "uncond_kwargs must have the names of model_kwargs"),
        ({"uncond_kwargs": {"y": torch.zeros(2)}}, "must have equal shapes"),
        ({"uncond_kwargs": {"y": 1}}, "must be two tensors or equal"),
        ({"guidance_scale": [1.0, 2.0]}, "one finite number or one a sample"),
        ({"dtype": torch.int64}, "floating point torch.dtype"),
        ({"device": "tpu"}, "is not a device"),
    ],
)
def test_what_does_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        guided(**changes)


def test_no_model():
    with pytest.raises(TypeError, match="must be a callable"):
        Call.of(3, SHAPE)


def test_the_dtype_is_the_models_own():
    assert Call.of(nn.Linear(4, 4).double(), SHAPE).dtype is torch.float64
    assert Call.of(model, SHAPE).dtype is torch.float32
    assert Call.of(nn.Linear(4, 4), SHAPE, dtype=torch.bfloat16).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="convert the model"):
        Call.of(nn.Linear(4, 4), SHAPE, dtype=torch.float64)


def test_a_speculative_sampler_builds_no_network_that_it_never_calls(monkeypatch):
    built = []
    build = Network.__init__

    def counted(self, call, doubled=False):
        built.append(call.batch)
        build(self, call, doubled)

    monkeypatch.setattr(Network, "__init__", counted)
    sampler = Sampler(model, SHAPE, num_inference_steps=20, speculate={0: 2, 500: 4}, device="cpu")
    assert built == []
    sampler(seeds=0, progress=False)
    assert set(built) <= {2 * 3, 4 * 3, 3}  # the last one for the comparison with calls of one draft
