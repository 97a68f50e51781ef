"""The division of samples among programs, the same in every kernel that works in the order of the noise.

A sample of n elements is four quarters of Q counters (philox.py). A program takes PARTS blocks of BLOCK counters of one
sample. With 64 threads a block is four counters for each thread, which is 16 bytes of float32 in an access.
"""

import triton
import triton.language as tl

from ddpm_fast.kernels.philox import quarter

BLOCK = 256
PARTS = tl.constexpr(2)  # a program fetches once what is the same for a whole sample
ELEMENTS = 4 * BLOCK * PARTS.value  # of a sample in a program
ROWS = tl.constexpr(65535)  # the most that a grid has in its second and third dimension


def grid(batch: int, n: int) -> tuple[int, int, int]:
    """Return the grid of programs for `batch` samples of n elements."""
    rows = ROWS.value
    return -(-quarter(n) // (BLOCK * PARTS.value)), min(batch, rows), -(-batch // rows)


@triton.jit
def sample_index():
    """Return the program's sample; it may lie past the last sample."""
    return tl.program_id(2) * ROWS + tl.program_id(1)


@triton.jit
def block_start(part: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first counter of the program's block number `part`; it may lie past the last counter."""
    return (tl.program_id(0) * PARTS + part) * BLOCK


@triton.jit
def lanes(j, n, q):
    """Return where the four runs of a block begin in the sample, less the counters `j`; and masks of their elements."""
    n = q * 0 + n  # a compiled-in 1 has no dtype; n may need 64 bits where q has 32
    q = q.to(n.dtype)
    begins = (q * 0, q, 2 * q, 3 * q)
    counted = j < q
    return begins, (counted & (j < n), counted & (j < n - q), counted & (j < n - 2 * q), counted & (j < n - 3 * q))


@triton.jit
def load4(pointer, begins, j, masks):
    """Load the elements begins[lane] + j of the four lanes."""
    return (
        tl.load(pointer + begins[0] + j, mask=masks[0]),
        tl.load(pointer + begins[1] + j, mask=masks[1]),
        tl.load(pointer + begins[2] + j, mask=masks[2]),
        tl.load(pointer + begins[3] + j, mask=masks[3]),
    )
