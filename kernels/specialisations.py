"""The forms of the kernels that are compiled ahead of time: what the host wrappers launch, option by option.

Triton compiles a kernel anew for each combination of pointer types, of constexprs, of absent tensors (None), of
integers that are 1, and of sizes and addresses divisible by 16. The list holds one launch for each option of each
kernel, and one launch for each combination that the sampling loop launches. Importing this module does not import
Triton.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODULES = dict.fromkeys(("draft", "verify", "decide", "commit"), "speculate")  # operations that share a file
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")  # of a launch, not of a kernel


@dataclass(frozen=True)
class Specialisation:
    """A launch of a kernel, described without tensors.

    Attributes:
        name: A unique name.
        op: The operation. Its kernel is `<op>_kernel` of `<op>_triton.py`, or of the file in `MODULES`. A parameter
            BLOCK is that module's BLOCK.
        arguments: The arguments by the kernel's parameter names. A tensor is given as its Triton type, such as "*bf16",
            at an address divisible by 16; an absent tensor is None. Numbers and constexprs are given as their values. A
            name in `OPTIONS` is an option of the launch.
        budget: The largest accepted number of machine instructions for one element on sm_90 (benchmarks/machine_code).
    """

    name: str
    op: str
    arguments: Mapping[str, Any]
    budget: float

    def kernel(self) -> Any:
        """Return the jitted function; imports Triton."""
        return getattr(self._module(), f"{self.op}_kernel")

    def launch_arguments(self) -> dict[str, Any]:
        """Return every argument of the kernel, in the order of its parameters.

        Raises:
            ValueError: The kernel has other parameters than the ones described.
        """
        parameters = list(self.kernel().arg_names)
        given = {key: value for key, value in self.arguments.items() if key not in OPTIONS}
        if "BLOCK" in parameters:
            given["BLOCK"] = self._module().BLOCK
        if set(given) != set(parameters):
            missing, unknown = sorted(set(parameters) - set(given)), sorted(set(given) - set(parameters))
            raise ValueError(f"{self.name}: {self.op}_kernel also takes {missing} and does not take {unknown}")
        return {key: given[key] for key in parameters}

    def options(self) -> dict[str, Any]:
        """Return the options of the launch: num_warps and the like."""
        return {key: value for key, value in self.arguments.items() if key in OPTIONS}

    def elements_per_thread(self) -> float:
        """Return the number of elements that a thread works on; in a loop over the sample, in one turn."""
        from ddpm_fast.kernels import tile_triton

        tiled = ("step", "q_sample", "normal", "draft", "verify", "commit")  # for one draft of a sample
        elements: int = tile_triton.ELEMENTS if self.op in tiled else self._module().BLOCK
        return elements / (int(self.options()["num_warps"]) * 32)

    def bytes_per_element(self) -> float:
        """Return the bytes that must move between memory and processor for each element of a sample or a draft."""
        given = self.arguments
        if self.op in MODULES:
            moved = {"draft": ("guess", "guess", "drafts", "noise", *("input",) * (1 + bool(given.get("GUIDED")))),
                     "verify": ("drafts", "noise", "guess", *("output",) * (1 + bool(given.get("GUIDED")))),
                     "commit": ("drafts", "guess", "guess", *("output",) * (1 + bool(given.get("GUIDED")))),
                     "decide": ("dots", "dots")}[self.op]  # fmt: skip
            return sum(_size(given[f"{name}_ptr"]) for name in moved)
        halves = 1 + bool(given.get("GUIDED"))
        times = {"output_ptr": halves + bool(given.get("LEARNED")), "input_ptr": halves}
        tensors = ("x", "output", "z", "known", "mask", "new", "x0", "input", "bytes")
        return sum(
            times.get(f"{name}_ptr", 1) * _size(given[f"{name}_ptr"]) for name in tensors if given.get(f"{name}_ptr")
        )

    def on(self, backend: str, warp_size: int) -> "Specialisation":
        """Return the launch on another backend, with portable arithmetic and as many threads."""
        warps = self.options()["num_warps"] * 32 // warp_size
        changes: dict[str, Any] = {"num_warps": warps}
        if "PTX" in self.arguments:
            changes["PTX"] = backend == "cuda"
        return dataclasses.replace(self, arguments={**self.arguments, **changes})

    def signature(self) -> dict[str, str]:
        """Return the Triton type of every parameter; "constexpr" where the value is compiled in."""
        constants = self.constants()
        return {key: "constexpr" if key in constants else _type(v) for key, v in self.launch_arguments().items()}

    def constants(self) -> dict[str, Any]:
        """Return the values that are compiled in: constexprs, None, and 1 where the kernel specialises integers."""
        parameters = inspect.signature(self.kernel().fn).parameters
        declared = [key for key, parameter in parameters.items() if "constexpr" in str(parameter.annotation)]
        arguments, plain = self.launch_arguments().items(), self._unspecialised()
        return {
            key: value
            for key, value in arguments
            if key in declared or value is None or (type(value) is int and value == 1 and key not in plain)
        }

    def divisible_by_16(self) -> list[str]:
        """Return the parameters that the compiler may take to be multiples of 16."""
        without = {*self.constants(), *self._unspecialised()}
        arguments = self.launch_arguments().items()
        return [k for k, v in arguments if k not in without and (type(v) is str or (type(v) is int and v % 16 == 0))]

    def _unspecialised(self) -> set[str]:
        """Return the parameters that the kernel keeps general (do_not_specialize)."""
        return {parameter.name for parameter in getattr(self.kernel(), "params", ()) if parameter.do_not_specialize}

    def _module(self) -> Any:
        return importlib.import_module(f"ddpm_fast.kernels.{MODULES.get(self.op, self.op)}_triton")


def compile_for(specialisation: Specialisation, backend: str, arch: int | str, warp_size: int) -> Any:
    """Compile for a GPU that need not be there and return Triton's compiled kernel.

    Args:
        specialisation: One of `SPECIALISATIONS`.
        backend: "cuda" or "hip".
        arch: 90 for sm_90, "gfx942", ….
        warp_size: 32 on CUDA, 64 on AMD's data centre GPUs.

    Raises:
        RuntimeError: TRITON_INTERPRET was set when the kernel was imported, so that there is nothing to compile.
        ValueError: The kernel has other parameters than the ones described.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    specialisation = specialisation.on(backend, warp_size)
    kernel = specialisation.kernel()
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("kernels are compiled only where TRITON_INTERPRET is unset when they are imported")
    names = list(kernel.arg_names)
    attributes = {(names.index(key),): [["tt.divisibility", 16]] for key in specialisation.divisible_by_16()}
    source = ASTSource(kernel, specialisation.signature(), specialisation.constants(), attributes)
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=specialisation.options())


def _size(kind: str) -> int:
    """Return the bytes of an element behind a pointer."""
    return max(1, int("".join(filter(str.isdigit, kind))) // 8)


def _type(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _step(name: str, budget: float, **changes: Any) -> Specialisation:
    """Return the barest step of 64 CIFAR-10 images, with changes."""
    arguments = {
        "x_ptr": "*fp32", "output_ptr": "*fp32", "z_ptr": None, "coefficients_ptr": "*fp32", "ids_ptr": "*i32",
        "base_ptr": "*i32", "seeds_ptr": None, "bound_ptr": None, "guidance_ptr": None, "known_ptr": None,
        "mask_ptr": None, "new_ptr": "*fp32", "x0_ptr": None, "input_ptr": None, "timestep_ptr": None,
        "clip": 0.0, "offset": 0, "steps": 1000, "visit": 0, "batch": 64, "n": 3072, "q": 768,
        "pixels": None, "output_batch": 3072, "output_channel": None, "output_pixel": None, "output_variance": None,
        "input_batch": None, "input_channel": None, "input_pixel": None,
        "NOISE": "none", "CLIP": "none", "USE_OUTPUT": False, "LEARNED": False, "GUIDED": False,
        "INPAINT_KNOWN": False, "WRITE_X0": False, "WRITE_INPUT": False,
        "WRITE_TIMESTEP": False, "STRIDED_OUTPUT": False, "STRIDED_INPUT": False, "ONE_WRAP": False,
        "PTX": True, "num_warps": 2,
    }  # fmt: skip
    return Specialisation(name, "step", arguments | changes, budget)


def _with(specialisation: Specialisation, name: str, budget: float, **changes: Any) -> Specialisation:
    arguments = {**specialisation.arguments, **changes}
    return dataclasses.replace(specialisation, name=name, budget=budget, arguments=arguments)


PHILOX = {"seeds_ptr": "*i64", "NOISE": "philox"}
TENSOR = {"z_ptr": "*fp32", "NOISE": "tensor"}
CLIP = {"clip": 1.0, "CLIP": "fixed"}
BOUND = {"bound_ptr": "*fp32", "CLIP": "bound"}
GUIDED = {"guidance_ptr": "*fp32", "GUIDED": True}
LEARNED = {"output_batch": 6144, "output_variance": 3072, "LEARNED": True}
ORIGIN = {"x0_ptr": "*fp32", "WRITE_X0": True}
TIMESTEP = {"timestep_ptr": "*i64", "WRITE_TIMESTEP": True}
INPUT = {"input_ptr": "*fp32", "WRITE_INPUT": True, "input_batch": 3072}
NEXT = INPUT | TIMESTEP
HALF = {"output_ptr": "*bf16", "input_ptr": "*bf16"}
KNOWN = {"known_ptr": "*fp32", "mask_ptr": "*fp32", "INPAINT_KNOWN": True}
CHANNELS_LAST_OUTPUT = {
    "pixels": 1024,
    "output_channel": 1,
    "output_pixel": 3,
    "STRIDED_OUTPUT": True,
    "ONE_WRAP": True,
}
CHANNELS_LAST_INPUT = {"pixels": 1024, "input_channel": 1, "input_pixel": 3, "STRIDED_INPUT": True, "ONE_WRAP": True}
HUGE = 2**31 + 2**20  # elements of one sample: 8 GB
SMALL = {"pixels": 64, "n": 192, "q": 48, "output_batch": 192, "input_batch": 192, "ONE_WRAP": False}

# The launches of the sampling loop for a noise-predicting DDPM with a float32 and with a bfloat16 network.
ENGINE = _step("step-engine", 33, **PHILOX, **CLIP, **NEXT)
MAIN = _with(ENGINE, "step-engine-bf16", 33, **HALF)
# The step by itself
STEP = _step("step-bf16-clip-philox", 32, **PHILOX, **CLIP, output_ptr="*bf16")

_Q_SAMPLE = Specialisation(
    "q_sample-philox",
    "q_sample",
    {
        "x_ptr": "*fp32", "t_ptr": "*i64", "alphas_ptr": "*fp64", "seeds_ptr": "*i64", "z_ptr": None,
        "new_ptr": "*fp32", "visit": 0, "batch": 64, "n": 3072, "q": 768, "STREAM": 2, "PTX": True, "num_warps": 2,
    },
    28,
)  # fmt: skip
_NORMAL = Specialisation(
    "normal-x_T",
    "normal",
    {
        "z_ptr": "*fp32", "seeds_ptr": "*i64", "ids_ptr": "*i32", "visits_ptr": "*i32", "stream": 0, "samples": 64,
        "n": 3072, "q": 768, "PTX": True, "num_warps": 2,
    },
    22,
)  # fmt: skip
_TO_UINT8 = Specialisation(
    "to_uint8-round",
    "to_uint8",
    {
        "x_ptr": "*fp32", "bytes_ptr": "*u8", "batch": 64, "size": 3072, "batch_stride": 3072, "channel_stride": 1024,
        "pixel_stride": 1, "CHANNELS": 3, "ROUND": True, "num_warps": 4, "enable_fp_fusion": False,
    },
    23,
)  # fmt: skip

_THRESHOLD = Specialisation(
    "threshold",
    "threshold",
    {
        "x_ptr": "*fp32", "output_ptr": "*bf16", "coefficients_ptr": "*fp32", "base_ptr": "*i32",
        "guidance_ptr": None, "bound_ptr": "*fp32", "offset": 0, "steps": 1000, "n": 3072, "below": 3055,
        "weight": 0.625, "max_value": 2.0, "pixels": None, "output_batch": 3072, "output_channel": None,
        "output_pixel": None, "GUIDED": False, "STRIDED_OUTPUT": False, "ONE_WRAP": False, "PTX": True,
        "num_warps": 8,
    },
    413,
)  # fmt: skip

_DRAFT = Specialisation(
    "draft",
    "draft",
    {
        "x_ptr": "*fp32", "guess_ptr": "*fp32", "drafts_ptr": "*fp32", "noise_ptr": "*fp32", "input_ptr": "*bf16",
        "timestep_ptr": "*i64", "position_ptr": "*i32", "windows_ptr": "*i32", "coefficients_ptr": "*fp32",
        "ids_ptr": "*i32", "seeds_ptr": "*i64", "steps": 1000, "batch": 4, "room": 32, "n": 3072, "q": 768,
        "GUIDED": False, "WIDTH": 16, "SPAN": 16, "PTX": True, "num_warps": 2,
    },
    38,
)  # fmt: skip
_VERIFY = Specialisation(
    "verify",
    "verify",
    {
        "drafts_ptr": "*fp32", "noise_ptr": "*fp32", "guess_ptr": "*fp32", "output_ptr": "*bf16", "bound_ptr": None,
        "guidance_ptr": None, "dots_ptr": "*fp32", "position_ptr": "*i32", "windows_ptr": "*i32",
        "coefficients_ptr": "*fp32", "clip": 1.0, "steps": 1000, "batch": 4, "room": 32, "n": 3072, "q": 768,
        "output_batch": 3072, "CLIP": "fixed", "USE_OUTPUT": False, "GUIDED": False, "WIDTH": 16, "PTX": True,
        "num_warps": 2,
    },
    23,
)  # fmt: skip
_DECIDE = Specialisation(
    "decide",
    "decide",
    {
        "dots_ptr": "*fp32", "factor_ptr": "*fp32", "rejected_ptr": "*u8", "position_ptr": "*i32",
        "windows_ptr": "*i32", "coefficients_ptr": "*fp32", "log_u_ptr": "*fp32", "steps": 1000,
        "room": 32, "parts": 2, "WIDTH": 16, "num_warps": 2,
    },
    70,
)  # fmt: skip
_COMMIT = Specialisation(
    "commit",
    "commit",
    {
        "x_ptr": "*fp32", "drafts_ptr": "*fp32", "noise_ptr": "*fp32", "guess_ptr": "*fp32", "output_ptr": "*bf16",
        "bound_ptr": None, "guidance_ptr": None, "factor_ptr": "*fp32", "position_ptr": "*i32",
        "coefficients_ptr": "*fp32", "clip": 1.0, "batch": 4, "room": 32, "n": 3072, "q": 768, "output_batch": 3072,
        "CLIP": "fixed", "USE_OUTPUT": False, "GUIDED": False, "WIDTH": 16, "PTX": True, "num_warps": 2,
    },
    33,
)  # fmt: skip
DRAFTS = {"bound_ptr": "*fp32", "CLIP": "bound", "clip": 0.0}

SPECIALISATIONS = (
    _step("step", 11),
    _step("step-philox", 29, **PHILOX),
    _step("step-tensor-noise", 14, **TENSOR),
    _step("step-clip", 14, **CLIP),
    _step("step-bound", 17, **BOUND),
    _step("step-use-output", 13, USE_OUTPUT=True),
    _step("step-learned", 34, **PHILOX, **LEARNED),
    _step("step-guided", 15, **GUIDED),
    _step("step-inpaint", 49, **PHILOX, **KNOWN),
    _step("step-x0", 11, **ORIGIN),
    _step("step-output-bf16", 12, output_ptr="*bf16"),
    _step("step-output-fp16", 12, output_ptr="*fp16"),
    _step("step-input-bf16", 13, **INPUT | {"input_ptr": "*bf16"}),
    _step("step-timestep", 12, **TIMESTEP),
    _step("step-output-channels-last", 25, **CHANNELS_LAST_OUTPUT, output_ptr="*bf16"),
    _step("step-input-channels-last", 39, **INPUT | CHANNELS_LAST_INPUT | {"input_ptr": "*bf16"}),
    STEP,
    _with(STEP, "step-bf16-clip-philox-input", 33, **INPUT | {"input_ptr": "*bf16"}),
    _with(STEP, "step-bf16-clip-philox-guided", 36, **GUIDED),
    _with(STEP, "step-bf16-clip-philox-learned", 38, **LEARNED),
    ENGINE,
    MAIN,
    _with(MAIN, "step-engine-fp16", 33, output_ptr="*fp16", input_ptr="*fp16"),
    _with(MAIN, "step-engine-second-step", 33, offset=1),
    _with(MAIN, "step-engine-batch-1", 33, batch=1),
    _with(MAIN, "step-engine-one-row", 33, steps=1),
    _with(MAIN, "step-engine-odd-size", 44, n=2, q=16, output_batch=2, input_batch=2),  # two moons
    _with(MAIN, "step-engine-channels-last", 65, **CHANNELS_LAST_OUTPUT | CHANNELS_LAST_INPUT),
    _with(  # few pixels a channel: 8 × 8
        MAIN, "step-engine-channels-last-small", 80, **CHANNELS_LAST_OUTPUT | CHANNELS_LAST_INPUT | SMALL
    ),
    _with(MAIN, "step-engine-guided", 39, **GUIDED),
    _with(MAIN, "step-engine-learned", 39, **LEARNED),
    _with(MAIN, "step-engine-learned-guided", 46, **LEARNED, **GUIDED),
    _with(MAIN, "step-engine-thresholding-x0", 38, **BOUND | {"clip": 0.0}, **ORIGIN),
    _with(MAIN, "step-engine-inpaint", 56, **KNOWN),
    _with(MAIN, "step-engine-inpaint-bool", 59, **KNOWN | {"mask_ptr": "*u1"}),
    _with(MAIN, "step-engine-latents", 31, clip=0.0, CLIP="none"),
    _with(MAIN, "step-engine-ddim-eta", 34, USE_OUTPUT=True),
    _with(MAIN, "step-engine-dit", 37, **GUIDED, output_batch=6144, clip=0.0, CLIP="none"),  # variance left unread
    _with(MAIN, "step-engine-x0", 34, **ORIGIN),
    _with(MAIN, "step-engine-multiple-of-16", 33, n=1200, q=304, output_batch=1200, input_batch=1200),
    _with(MAIN, "step-engine-huge", 34, n=HUGE, q=HUGE // 4, output_batch=HUGE, input_batch=HUGE),
    _step("step-scheduler", 16, **TENSOR, **CLIP),  # a generator's noise, x' alone: diffusers' DDPMScheduler.step
    _step("step-scheduler-x0", 16, **TENSOR, **CLIP, **ORIGIN),
    _step("step-scheduler-learned", 21, **TENSOR, **CLIP, **ORIGIN, **LEARNED),  # guided-diffusion's p_sample
    _step("step-scheduler-ddim", 14, **CLIP, USE_OUTPUT=True),
    _with(ENGINE, "step-engine-generator", 17, seeds_ptr=None, **TENSOR),
    _with(ENGINE, "step-engine-ddim", 17, seeds_ptr=None, NOISE="none", USE_OUTPUT=True),
    _with(ENGINE, "step-engine-guided-batch-1", 38, batch=1, **GUIDED),
    _Q_SAMPLE,
    _with(_Q_SAMPLE, "q_sample-tensor", 12, seeds_ptr=None, z_ptr="*fp32", STREAM=None),
    _with(_Q_SAMPLE, "q_sample-int32", 27, t_ptr="*i32"),
    _with(_Q_SAMPLE, "q_step-philox", 28, STREAM=4),
    _THRESHOLD,
    _with(_THRESHOLD, "threshold-guided", 433, **GUIDED),
    _NORMAL,
    _with(_NORMAL, "normal-step", 22, stream=1),
    _TO_UINT8,
    _with(_TO_UINT8, "to_uint8-truncate", 22, ROUND=False),
    _with(_TO_UINT8, "to_uint8-grey", 12, CHANNELS=1, size=1024, batch_stride=1024),
    _with(_TO_UINT8, "to_uint8-channels-last", 22, channel_stride=1, pixel_stride=3),
    _with(_TO_UINT8, "to_uint8-bf16", 24, x_ptr="*bf16"),
    _DRAFT,
    _with(_DRAFT, "draft-guided", 40, GUIDED=True),
    _with(_DRAFT, "draft-float32-batch-1", 37, input_ptr="*fp32", batch=1),
    _VERIFY,
    _with(_VERIFY, "verify-bound", 26, **DRAFTS),
    _with(_VERIFY, "verify-guided", 28, **GUIDED),
    _with(_VERIFY, "verify-latents", 21, clip=0.0, CLIP="none"),
    _with(_VERIFY, "verify-ddim", 26, USE_OUTPUT=True),
    _DECIDE,
    _COMMIT,
    _with(_COMMIT, "commit-bound", 38, **DRAFTS),
    _with(_COMMIT, "commit-guided", 38, **GUIDED),
    _with(_COMMIT, "commit-ddim", 40, USE_OUTPUT=True),
)
