"""The parts: the settings that whole runs are measured in, the most important first."""

from dataclasses import dataclass

from benchmarks.walks.arms import ALONE, COMPILED, OURS, SHIPPED

_OURS = (OURS, f"{OURS}, channels_last", f"{OURS}, network as it is", ALONE)
_OURS_COMPILED = (f"{OURS}, compiled", f"{OURS}, channels_last, compiled")
_FUSED = f"{OURS}, fused"
_RIVALS = ("CUDA graph by hand", "denoising-diffusion-pytorch")
_REDUCED = (f"{COMPILED} reduce-overhead", f"{COMPILED} reduce-overhead, channels_last")
_AUTOTUNED = (f"{COMPILED} max-autotune", f"{COMPILED} max-autotune, channels_last")
_DEFAULT = (f"{COMPILED} default", f"{COMPILED} default, channels_last")
_ALL = (SHIPPED, _FUSED, *_OURS_COMPILED, *_REDUCED, *_OURS, *_RIVALS)
_FEW = (SHIPPED, _FUSED, *_OURS_COMPILED, *_REDUCED, OURS)
_TUNED = (*_AUTOTUNED, *_OURS_COMPILED, *_OURS)


@dataclass(frozen=True)
class Part:
    """The setting that one command measures, with its goals.

    Attributes:
        kind: A key of `KINDS`.
        batch: The batch size.
        precision: "float32", "tf32" or "bfloat16".
        steps: The number of steps of a run. Where the number is not 1000, the times of 1000 steps are scaled.
        arms: The arms, in the order in which they take turns.
        shipped_goal: The least speed-up of our fastest arm over diffusers as shipped.
        compiled_goal: The least speed-up of our fastest arm over the fastest compiled diffusers.
        slowest_goal: The least speed-up of our slowest arm over diffusers as shipped.
        overhead_goal: The largest share of time that the loop may add to our network call alone.
    """

    kind: str
    batch: int
    precision: str
    steps: int = 50
    arms: tuple[str, ...] = _FEW
    shipped_goal: float | None = None
    compiled_goal: float | None = None
    slowest_goal: float = 1.0
    overhead_goal: float | None = 0.02


# The most important parts stand first.
PARTS = {
    "cifar-1-bfloat16": Part("cifar", 1, "bfloat16", 100, _ALL, shipped_goal=6, compiled_goal=1.5),
    "cifar-256-bfloat16": Part("cifar", 256, "bfloat16", compiled_goal=1.15),
    "256-1-bfloat16": Part("256", 1, "bfloat16", compiled_goal=1.2),
    "cifar-1-float32": Part("cifar", 1, "float32", 100, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-tf32": Part("cifar", 1, "tf32", 100, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-bfloat16-autotune": Part("cifar", 1, "bfloat16", 100, _TUNED, compiled_goal=1.5),
    "cifar-256-bfloat16-autotune": Part("cifar", 256, "bfloat16", 50, _TUNED, compiled_goal=1.15),
    "cifar-16-bfloat16": Part("cifar", 16, "bfloat16"),
    "cifar-64-bfloat16": Part("cifar", 64, "bfloat16"),
    "256-16-bfloat16": Part("256", 16, "bfloat16"),
    "dit-1-bfloat16": Part("dit", 1, "bfloat16"),
    "dit-16-bfloat16": Part("dit", 16, "bfloat16"),
    "cpu": Part(
        "moons", 1, "float32", 50, (SHIPPED, *_OURS, *_OURS_COMPILED, _RIVALS[1], *_DEFAULT),
        shipped_goal=1.05, overhead_goal=None,
    ),
    "smoke": Part("tiny", 2, "float32", 8, (SHIPPED, *_OURS, _OURS_COMPILED[1], *_RIVALS, _DEFAULT[0])),
    "dry": Part("dot", 2, "float32", 8, (SHIPPED, _OURS[2], _RIVALS[0])),
    "dry-1": Part("dot", 1, "float32", 8, (_OURS[2],)),
}  # fmt: skip
TRIALS = ("smoke", "dry", "dry-1")  # parts whose numbers mean nothing
