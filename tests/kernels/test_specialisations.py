"""Every form of the step that is compiled ahead of time, run: against float64 and, with it, against its twin."""

import numpy as np
import pytest
import torch

from ddpm_fast.kernels.specialisations import SPECIALISATIONS
from tests.kernels.step_problems import assert_near, launch, make, rounded

DTYPES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16}
STEPS = {s.name: s for s in SPECIALISATIONS if s.op == "step"}
BATCH = 2  # no form depends on it


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def described(a):
    """The problem and the launch that the arguments of a specialisation describe."""
    channels = a["n"] // a["pixels"] if a["pixels"] else 3 if a["n"] % 3 == 0 else 1
    limit = {"none": "none", "fixed": "clip", "bound": "bound"}[a["CLIP"]]
    mask = {None: "none", "*fp32": "soft", "*u1": "bool"}[a["mask_ptr"]]
    p = make(
        (BATCH, channels, a["n"] // channels),
        noise=a["NOISE"],
        limit=limit,
        guided=a["GUIDED"],
        learned=a["LEARNED"],
        doubled=a["output_batch"] == 2 * a["n"],
        use_output=a["USE_OUTPUT"],
        inpaint=mask,
        output_dtype=DTYPES[a["output_ptr"]],
        offset=a["offset"],
    )
    return p, {
        "input_dtype": DTYPES.get(a["input_ptr"]),
        "channels_last": a["STRIDED_INPUT"],
        "layout": channels_last if a["STRIDED_OUTPUT"] else None,
    }


@pytest.mark.parametrize("name", STEPS)
def test_step(name, kernel_device):
    arguments = STEPS[name].arguments
    if arguments["n"] > 2**31:
        pytest.skip("8 GB a sample; test_strides_of_more_than_31_bits has offsets that large")
    p, options = described(arguments)
    for backend in ("torch", "triton"):
        result, x0, model_input, _ = launch(p, backend, kernel_device, **options)
        assert_near(p, result, x0)
        if model_input is not None:
            for half in model_input.split(BATCH):
                assert torch.equal(half, rounded(result, half.dtype, backend))


def test_every_option_is_among_them():
    """Both values of every switch, and every value of the others."""
    seen = {key: {str(s.arguments[key]) for s in STEPS.values()} for key in next(iter(STEPS.values())).arguments}
    assert seen["NOISE"] == {"none", "philox", "tensor"}
    assert seen["CLIP"] == {"none", "fixed", "bound"}
    assert seen["output_ptr"] == {"*fp32", "*bf16", "*fp16"}
    assert seen["mask_ptr"] == {"None", "*fp32", "*u1"}
    switches = {key for key in seen if key.isupper()} - {"NOISE", "CLIP", "PTX"}
    assert {key: seen[key] for key in switches} == {key: {"True", "False"} for key in switches}
    sizes = np.array([s.arguments["n"] for s in STEPS.values()])
    assert {bool(v) for v in sizes % 16 == 0} == {bool(v) for v in sizes % 64 == 0} == {True, False}
