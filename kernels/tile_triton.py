"""How samples are divided among programs, the same in every kernel that works in the order of the noise.

A sample of n elements is four quarters of Q counters (philox.py). A program takes PARTS blocks of BLOCK counters of one
sample; with 64 threads a block is four counters a thread, which is 16 bytes of float32 an access.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.philox import quarter

BLOCK = 256
PARTS = tl.constexpr(2)  # what is the same for a whole sample is fetched once for both
ROWS = tl.constexpr(65535)  # the most that a grid has in its second and third dimension


def grid(batch: int, n: int) -> tuple[int, int, int]:
    """Programs for `batch` samples of n elements."""
    return triton.cdiv(quarter(n), BLOCK * PARTS.value), min(batch, ROWS.value), triton.cdiv(batch, ROWS.value)


@triton.jit
def sample_index():
    """The program's sample; may lie past the last one."""
    return tl.program_id(2) * ROWS + tl.program_id(1)


@triton.jit
def block_start(part: tl.constexpr, BLOCK: tl.constexpr):
    """The first counter of the program's block number `part`; may lie past the last one."""
    return (tl.program_id(0) * PARTS + part) * BLOCK
