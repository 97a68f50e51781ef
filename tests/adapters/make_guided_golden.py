"""Write tests/golden/guided_diffusion.npz: what OpenAI's own code samples.

    python tests/adapters/make_guided_golden.py path/to/guided-diffusion path/to/improved-diffusion [COMMIT COMMIT]

The paths are checkouts; the commit ids are asked of git where they are not given. The tests read the file and never
import the originals.
"""

import importlib
import itertools
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.adapters import guided_standin

TARGET = Path(__file__).parents[1] / "golden" / "guided_diffusion.npz"
FACTORS = {
    "mean": ("PREVIOUS_X", "START_X", "EPSILON"),
    "variance": ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"),
    "eta": (None, 0.0, 0.7),
    "clip": (True, False),
    "schedule": ("linear", "cosine"),
    "respacing": (None, "", "10", "ddim10", "5,3,2"),
    "rescale": (False, True),
    "denoised": (False, True),
    "cond": (False, True),
    "library": ("guided", "improved"),
}
FULL = ("mean", "variance", "eta", "clip")  # every combination of these
LONG = {
    "mean": "EPSILON", "variance": "LEARNED_RANGE", "eta": None, "clip": True, "schedule": "linear", "respacing": "",
    "rescale": True, "denoised": False, "cond": False, "library": "guided", "steps": 1000,
}  # fmt: skip


def library(checkout, package):
    """The names that guided_standin has, from the original."""
    sys.path.insert(0, str(checkout))
    diffusion = importlib.import_module(f"{package}.gaussian_diffusion")
    respace = importlib.import_module(f"{package}.respace")
    return types.SimpleNamespace(**{**vars(diffusion), **vars(respace)})


def cases():
    """Every combination of FULL, and every pair of any two factors' values."""
    choose = random.Random(0)
    wanted = {
        frozenset({one, other})
        for a, b in itertools.combinations(FACTORS, 2)
        for one, other in itertools.product([(a, v) for v in FACTORS[a]], [(b, v) for v in FACTORS[b]])
        if {one, other} != {("cond", True), ("library", "improved")}
    }
    for values in itertools.product(*(FACTORS[name] for name in FULL), range(2)):
        case = dict(zip(FULL, values, strict=False))
        case |= {name: choose.choice(FACTORS[name]) for name in FACTORS if name not in FULL}
        case["cond"] = case["cond"] and case["library"] == "guided"
        wanted -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        yield {**case, "steps": 50 if case["respacing"] else 25}
    assert not wanted, wanted


def spacings(space_timesteps):
    """What is kept of T timesteps, as (how many, a checksum), or None where it is an error."""
    for steps, counts in itertools.chain(
        itertools.product((2, 7, 100), [f"{kind}{n}" for kind in ("", "ddim") for n in range(1, 12)]),
        itertools.product((100,), [f"{kind}{n}" for kind in ("", "ddim") for n in range(12, 103)]),
        itertools.product((1000, 4000), [f"{kind}{n}" for kind in ("", "ddim") for n in (25, 50, 61, 100, 250, 333)]),
        itertools.product((50, 300, 1000, 1001), ("10,15,20", "5,3,2", "1,1,1,1", "90,60,60,20,20", "0,7", "26,25")),
    ):
        try:
            kept = sorted(space_timesteps(steps, counts))
            yield steps, counts, [len(kept), sum((i + 1) * t for i, t in enumerate(kept))]
        except ValueError:
            yield steps, counts, None


def main():
    paths, commits = sys.argv[1:3], sys.argv[3:5]
    commits = commits or [
        subprocess.run(["git", "-C", path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        for path in paths
    ]
    libraries = {
        "guided": library(paths[0], "guided_diffusion"),
        "improved": library(paths[1], "improved_diffusion"),
    }
    entries, samples, origins = [], [], []
    for case in [*cases(), LONG]:
        diffusion = guided_standin.make(libraries[case["library"]], case)
        samples.append(guided_standin.walk(diffusion, case).numpy())
        entries.append({**case, "state": guided_standin.state_hash()})
        half = diffusion.num_timesteps // 2
        origins.append(guided_standin.walk(diffusion, case, progressive=True)[half]["pred_xstart"].numpy())
    content = {
        "commits": dict(zip(("guided-diffusion", "improved-diffusion"), map(str.strip, commits), strict=True)),
        "torch": torch.__version__,
        "cases": entries,
        "spacings": list(spacings(libraries["guided"].space_timesteps)),
    }
    np.savez_compressed(
        TARGET, content=np.array(json.dumps(content)), samples=np.stack(samples), origins=np.stack(origins)
    )
    print(f"{len(entries)} walks: {TARGET} ({TARGET.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
