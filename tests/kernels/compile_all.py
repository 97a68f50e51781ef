"""Compile every specialisation and print what came of it as JSON: a program of its own, outside the interpreter.

For each: the error or None, the size of the binary, the bytes of registers spilled to local memory (None where the
compiler does not say), the kernel's PTX, and where the host's launch differs from the specialisation.
"""

import contextlib
import importlib
import io
import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from ddpm_fast.kernels.specialisations import MAIN, SPECIALISATIONS, Specialisation, compile_for

SM_90 = ("cuda", 90, 32)
OTHERS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
REPRESENTATIVE = (MAIN.name, "normal-x_T", "q_sample-tensor", "to_uint8-round")
BINARIES = ("cubin", "hsaco")
TENSORS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64}


class Recorder:
    """Stands in for a kernel and keeps the arguments that it is launched with."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def tensor(kind, *shape):
    return None if kind is None else torch.zeros(shape, dtype=TENSORS[kind.removeprefix("*")])


def launch_step(step_triton, a):
    halves = 2 if a["GUIDED"] else 1
    shape = (a["batch"], 1, a["n"])
    return step_triton(
        tensor(a["x_ptr"], *shape),
        tensor(a["output_ptr"], halves * a["batch"], a["output_stride"] // a["n"], a["n"]),
        tensor(a["coefficients_ptr"], a["steps"], 8),
        tensor(a["ids_ptr"], a["steps"], 2),
        tensor(a["base_ptr"], a["batch"]),
        a["offset"],
        seeds=tensor(a["seeds_ptr"], a["batch"]),
        z=tensor(a["z_ptr"], *shape),
        visit=a["visit"],
        clip=a["clip"] if a["CLIP"] == "fixed" else None,
        bound=tensor(a["bound_ptr"], a["batch"]),
        guidance=tensor(a["guidance_ptr"], a["batch"]),
        learned=a["LEARNED"],
        use_output=a["USE_OUTPUT"],
        x_new=tensor(a["new_ptr"], *shape),
        x0_new=tensor(a["x0_ptr"], *shape),
        model_input=tensor(a["input_ptr"], halves * shape[0], *shape[1:]),
        timestep=tensor(a["timestep_ptr"], halves * a["batch"]),
    )


def launch_q_sample(q_sample_triton, a):
    return q_sample_triton(
        tensor(a["x0_ptr"], 4, a["n"]),
        tensor(a["t_ptr"], 4),
        tensor(a["alphas_cumprod_ptr"], 1000),
        seeds=tensor(a["seeds_ptr"], 4),
        z=tensor(a["z_ptr"], 4, a["n"]),
        visit=a["visit"],
        x_t=tensor(a["x_t_ptr"], 4, a["n"]),
    )


def launch_normal(normal_triton, a):
    return normal_triton(tensor(a["seeds_ptr"], 4), tensor(a["ids_ptr"], 4), a["stream"], (a["n"],))


def launch_to_uint8(to_uint8_triton, a):
    batch = a["total"] // a["pixels"] // a["channels"]
    return to_uint8_triton(
        tensor(a["x_ptr"], batch, a["channels"], a["pixels"], 1), rounding="round" if a["ROUND"] else "truncate"
    )


LAUNCHES = {"step": launch_step, "q_sample": launch_q_sample, "normal": launch_normal, "to_uint8": launch_to_uint8}


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


def compiled(specialisation, target):
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            kernel = compile_for(specialisation, *target)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    binary = next(kernel.asm[name] for name in BINARIES if name in kernel.asm)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log.getvalue())]
    return {
        "error": None,
        "size": len(binary),
        "spilled": sum(spilled) if spilled else None,
        "ptx": kernel.asm.get("ptx", ""),
    }


def refusals():
    """What `compile_for` says to a description that is one argument short, and one too long."""
    said = []
    for arguments in (
        {key: value for key, value in MAIN.arguments.items() if key != "visit"},
        {**MAIN.arguments, "temperature": 1.0},
    ):
        try:
            compile_for(Specialisation("wrong", "step", arguments), *SM_90)
        except ValueError as error:
            said.append(str(error))
    return said


def main():
    with contextlib.suppress(AttributeError):
        triton.knobs.nvidia.dump_ptxas_log = True  # says what was spilled; knobs are of Triton 3.4
    named = {s.name: s for s in SPECIALISATIONS}
    result = {
        "sm_90": {name: compiled(s, SM_90) for name, s in named.items()},
        **{target: {name: compiled(named[name], OTHERS[target]) for name in REPRESENTATIVE} for target in OTHERS},
        "differences": {name: differences(s) for name, s in named.items()},
        "refusals": refusals(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
