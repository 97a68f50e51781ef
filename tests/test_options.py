"""The keyword options: every field of the two dataclasses, written once more for type checkers, and split again."""

import dataclasses
import inspect
import typing

import pytest

from ddpm_fast import accelerate
from ddpm_fast.config import ConfigOptions, SamplerConfig
from ddpm_fast.engine.execution import Execution, ExecutionOptions
from ddpm_fast.kernels.step import StepOptions, step, step_torch
from ddpm_fast.options import SamplerOptions, execution_of, split_options
from ddpm_fast.sample import DrawOptions, Sampler, sample


@pytest.mark.parametrize(("options", "target"), [(ConfigOptions, SamplerConfig), (ExecutionOptions, Execution)])
def test_the_options_are_the_fields_with_their_types(options, target):
    fields = typing.get_type_hints(target)
    assert typing.get_type_hints(options) == {field.name: fields[field.name] for field in dataclasses.fields(target)}


def test_the_options_of_the_functions_are_their_parameters():
    sampler = inspect.signature(Sampler).parameters
    assert set(sampler) - {"model", "shape", "decode"} == set(typing.get_type_hints(SamplerOptions))
    draw = inspect.signature(Sampler.__call__).parameters
    assert set(draw) - {"self", "model_kwargs", "uncond_kwargs", "output"} == set(typing.get_type_hints(DrawOptions))
    assert set(inspect.signature(sample).parameters) == (set(sampler) | set(draw)) - {"self"}


def test_help_lists_the_options_of_accelerate():
    parameters = inspect.signature(accelerate).parameters
    for field in dataclasses.fields(Execution):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("function", [step, step_torch])
def test_help_lists_the_options_of_a_step(function):
    parameters = inspect.signature(function).parameters
    assert set(parameters) >= set(StepOptions.__annotations__)
    defaults = {name: parameters[name].default for name in StepOptions.__annotations__}
    assert {name: default for name, default in defaults.items() if default is not None} == {
        "learned": False,
        "use_output": True,
    }


def test_options_are_split():
    config, execution = split_options({"eta": 0.5, "sampler": "ddim", "optimize": None, "compile": True})
    assert (config.eta, config.sampler) == (0.5, "ddim")
    assert execution == Execution(optimize=None, compile=True)
    assert split_options({}, config) == (config, Execution())


@pytest.mark.parametrize("split", [split_options, execution_of])
def test_a_misspelt_option_is_named_with_its_neighbour(split):
    with pytest.raises(TypeError, match=r"unknown option 'memory_fromat'; did you mean 'memory_format'\?"):
        split({"memory_fromat": "auto"})
    with pytest.raises(TypeError, match="did you mean 'execution'"):
        accelerate(object(), executoin="graph")
