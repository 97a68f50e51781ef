"""Compile every specialisation and print what came of it as JSON: a program of its own, outside the interpreter.

For each: the error or None, its row of benchmarks/machine_code, its PTX or GCN assembly, and where the host's launch
differs from the specialisation. And the row of a kernel that was changed, for a test that the count is that of the
source.
"""

import importlib
import importlib.util
import inspect
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.machine_code import run as sass
from ddpm_fast.kernels import step_triton
from ddpm_fast.kernels.specialisations import MAIN, MODULES, SPECIALISATIONS, Specialisation, compile_for

SM_90 = sass.TARGETS["sm_90"]
NAMED = {specialisation.name: specialisation for specialisation in SPECIALISATIONS}
REPRESENTATIVE = (MAIN.name, "normal-x_T", "q_sample-tensor", "to_uint8-round", "threshold")
LINE, LONGER = "new = c_x0 * x0 + c_x * x\n", "new = c_x0 * x0 + c_x * x + x0 * x0 * x\n"
TENSORS = {
    "fp16": torch.float16,
    "u1": torch.bool,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


class Recorder:
    """Stands in for a kernel and keeps the arguments that it is launched with."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def tensor(kind, *shape):
    return None if kind is None else torch.empty(shape, dtype=TENSORS[kind.removeprefix("*")], device="meta")


def with_strides(values, channels_last):
    return values.mT.contiguous().mT if channels_last else values


def launch_step(step_triton, a):
    halves = 2 if a["GUIDED"] else 1
    channels = a["n"] // a["pixels"] if a["pixels"] else 1
    pixels = a["n"] // channels
    shape = (a["batch"], channels, pixels)
    return step_triton(
        tensor(a["x_ptr"], *shape),
        with_strides(
            tensor(a["output_ptr"], halves * a["batch"], a["output_batch"] // a["n"] * channels, pixels),
            a["STRIDED_OUTPUT"],
        ),
        tensor(a["coefficients_ptr"], a["steps"], 10),
        tensor(a["ids_ptr"], a["steps"], 2),
        tensor(a["base_ptr"], a["batch"]),
        a["offset"],
        seeds=tensor(a["seeds_ptr"], a["batch"]),
        z=tensor(a["z_ptr"], *shape),
        clip=a["clip"] if a["CLIP"] == "fixed" else None,
        bound=tensor(a["bound_ptr"], a["batch"]),
        guidance=tensor(a["guidance_ptr"], a["batch"]),
        known=tensor(a["known_ptr"], *shape),
        mask=tensor(a["mask_ptr"], *shape),
        learned=a["LEARNED"],
        use_output=a["USE_OUTPUT"],
        x_new=tensor(a["new_ptr"], *shape),
        x0_new=tensor(a["x0_ptr"], *shape),
        model_input=with_strides(tensor(a["input_ptr"], halves * shape[0], *shape[1:]), a["STRIDED_INPUT"]),
        timestep=tensor(a["timestep_ptr"], halves * a["batch"]),
    )


def launch_q_sample(q_sample_triton, a):
    batch, n = a["batch"], a["n"]
    return q_sample_triton(
        tensor(a["x_ptr"], batch, n),
        tensor(a["t_ptr"], batch),
        tensor(a["alphas_ptr"], 1000),
        a["STREAM"] or 0,
        seeds=tensor(a["seeds_ptr"], batch),
        z=tensor(a["z_ptr"], batch, n),
        visit=a["visit"],
        x_t=tensor(a["new_ptr"], batch, n),
    )


def launch_normal(normal_triton, a):
    samples = a["samples"]
    return normal_triton(tensor(a["seeds_ptr"], samples), tensor(a["ids_ptr"], samples), a["stream"], (a["n"],))


def launch_to_uint8(to_uint8_triton, a):
    x = torch.empty(
        a["batch"], a["CHANNELS"], a["size"] // a["CHANNELS"], 1, dtype=TENSORS[a["x_ptr"][1:]], device="meta"
    )
    if a["channel_stride"] == 1 < a["CHANNELS"]:
        x = x.contiguous(memory_format=torch.channels_last)
    return to_uint8_triton(x, rounding="round" if a["ROUND"] else "truncate")


def launch_threshold(threshold_triton, a):
    x = tensor(a["x_ptr"], 64, a["n"])
    halves = 2 if a["GUIDED"] else 1
    return threshold_triton(
        x,
        tensor(a["output_ptr"], halves * 64, a["n"]),
        tensor(a["coefficients_ptr"], a["steps"], 10),
        tensor(a["base_ptr"], 64),
        a["offset"],
        below=a["below"],
        weight=a["weight"],
        max_value=a["max_value"],
        guidance=tensor(a["guidance_ptr"], 64),
        bound=tensor(a["bound_ptr"], 64),
    )


def speculative(a):
    """What all launches of a round take: the table's tensors, the buffers, and what limits and guides."""
    batch, room, width, n = a.get("batch", 4), a["room"], a["WIDTH"], a.get("n", 1)
    halves = 2 if a.get("GUIDED") else 1
    return {
        "position": tensor(a["position_ptr"], batch, 5),
        "windows": tensor(a.get("windows_ptr"), 1000),
        "coefficients": tensor(a["coefficients_ptr"], 1000, 10),
        "ids": tensor(a.get("ids_ptr"), 1000, 2),
        "seeds": tensor(a.get("seeds_ptr"), batch),
        "x": tensor(a.get("x_ptr"), batch, n),
        **{name: tensor(a.get(f"{name}_ptr"), batch, room, n) for name in ("drafts", "noise", "guess")},
        "output": tensor(a.get("output_ptr"), halves * batch * width, n),
        "model_input": tensor(a.get("input_ptr"), halves * batch * width, n),
        "timestep": tensor(a.get("timestep_ptr"), halves * batch * width),
        "dots": tensor(a.get("dots_ptr"), batch, room, a.get("parts", 1), 2),
        "log_u": tensor(a.get("log_u_ptr"), batch, 1000),
        "factor": tensor(a.get("factor_ptr"), batch),
        "rejected": tensor(a.get("rejected_ptr"), batch, 1000),
        "clip": a.get("clip") if a.get("CLIP") == "fixed" else None,
        "bound": tensor(a.get("bound_ptr"), batch * width),
        "guidance": tensor(a.get("guidance_ptr"), batch * width),
        "use_output": a.get("USE_OUTPUT"),
        "width": width,
    }


def launch_speculative(launch, a):
    given = speculative(a)
    return launch(**{name: given[name] for name in inspect.signature(launch).parameters})


LAUNCHES = {
    **dict.fromkeys(MODULES, launch_speculative),
    "step": launch_step,
    "q_sample": launch_q_sample,
    "normal": launch_normal,
    "to_uint8": launch_to_uint8,
    "threshold": launch_threshold,
}


def differences(specialisation):
    """Where Triton's own reading of the host's launch is not the specialisation."""
    kernel, arguments = specialisation.kernel(), specialisation.launch_arguments()
    module = importlib.import_module(kernel.fn.__module__)
    recorder = Recorder()
    setattr(module, kernel.fn.__name__, recorder)
    try:
        LAUNCHES[specialisation.op](getattr(module, f"{specialisation.op}_triton"), arguments)
    finally:
        setattr(module, kernel.fn.__name__, kernel)
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget(*SM_90)))
    values, kinds, options = bind(*recorder.args, **recorder.kwargs)
    kinds = dict(zip(values, kinds, strict=True))
    launched = {
        "signature": {name: kind for name, (kind, _) in kinds.items()},
        "constants": {name: values[name] for name, (kind, _) in kinds.items() if kind == "constexpr"},
        "divisible by 16": [n for n, (kind, extra) in kinds.items() if kind != "constexpr" and "D" in (extra or "")],
        "options": options,
    }
    described = {
        "signature": specialisation.signature(),
        "constants": specialisation.constants(),
        "divisible by 16": specialisation.divisible_by_16(),
        "options": specialisation.options(),
    }
    return [f"{k}: launched {launched[k]}, described {described[k]}" for k in launched if launched[k] != described[k]]


def compiled(job):
    target, name = job
    try:
        kernel = compile_for(NAMED[name], *sass.TARGETS[target])
        row = sass.measure(NAMED[name], target, kernel)
    except Exception as error:
        return target, name, {"error": f"{type(error).__name__}: {error}"}
    return target, name, {"error": None, **row, "assembly": kernel.asm.get("ptx") or kernel.asm["amdgcn"]}


def changed():
    """The row of the main step with one line of its kernel changed: a multiplication and a multiply-add more."""
    source = Path(step_triton.__file__).read_text()
    assert source.count(LINE) == 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_changed_triton.py"
        path.write_text(source.replace(LINE, LONGER).replace("def step_kernel", "def step_changed_kernel"))
        spec = importlib.util.spec_from_file_location("ddpm_fast.kernels.step_changed_triton", path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
        specialisation = Specialisation("changed", "step_changed", MAIN.arguments, 0)
        row = sass.measure(specialisation, "sm_90")
        # Counted a thread there; the elements are those of the step that it was made from.
        return row["instructions"] / MAIN.elements_per_thread()


def refusals():
    """What `compile_for` says to a description that is one argument short, and one too long."""
    said = []
    for arguments in (
        {key: value for key, value in MAIN.arguments.items() if key != "offset"},
        {**MAIN.arguments, "temperature": 1.0},
    ):
        try:
            compile_for(Specialisation("wrong", "step", arguments, 0), *SM_90)
        except ValueError as error:
            said.append(str(error))
    return said


def main():
    jobs = [("sm_90", name) for name in NAMED]
    jobs += [(target, name) for target in sass.TARGETS if target != "sm_90" for name in REPRESENTATIVE]
    result = {target: {} for target in sass.TARGETS}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for target, name, found in pool.imap(compiled, jobs, chunksize=4):
            result[target][name] = found
    result["differences"] = {name: differences(specialisation) for name, specialisation in NAMED.items()}
    result["refusals"] = refusals()
    result["changed"] = changed()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
