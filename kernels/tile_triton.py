"""How samples are divided among programs, the same in every kernel that works in the order of the noise.

A sample of n elements is four quarters of Q counters (philox.py). A program takes PARTS blocks of BLOCK counters of one
sample; with 64 threads a block is four counters a thread, which is 16 bytes of float32 an access.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.philox import quarter

BLOCK = 256
PARTS = tl.constexpr(2)  # what is the same for a whole sample is fetched once for both
ELEMENTS = 4 * BLOCK * PARTS.value  # of a sample, a program
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


@triton.jit
def lanes(j, n, q):
    """Where the four runs of a block begin in the sample, less the counters `j`; and which of their elements exist."""
    n = q * 0 + n  # where n is 1 and compiled in, it has no dtype; where q has 32 bits, n may need 64
    q = q.to(n.dtype)
    begins = (q * 0, q, 2 * q, 3 * q)
    counted = j < q
    return begins, (counted & (j < n), counted & (j < n - q), counted & (j < n - 2 * q), counted & (j < n - 3 * q))


@triton.jit
def load4(pointer, begins, j, masks):
    """The elements begins[lane] + j of the four lanes."""
    return (
        tl.load(pointer + begins[0] + j, mask=masks[0]),
        tl.load(pointer + begins[1] + j, mask=masks[1]),
        tl.load(pointer + begins[2] + j, mask=masks[2]),
        tl.load(pointer + begins[3] + j, mask=masks[3]),
    )
