"""The operations of the engine, each on Triton and on PyTorch.

`<op>.py` holds the operation's contract, the PyTorch twin and the choice between the two; `<op>_triton.py` holds
the kernel and its launch, and is imported only when a kernel runs. Nothing here imports the rest of the package.

One rule holds for numbers that are not finite, in kernels and twins: arithmetic is that of IEEE 754, and nothing hides
NaN. Clipping bounds infinity and keeps NaN; the bound of a sample with NaN, or of a quantile between infinite numbers,
is NaN; a draft whose test cannot be decided is rejected. Denormals are kept. Only bytes have no NaN: `to_uint8` makes 0
of it.
"""

from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.q_sample import q_sample, q_step
from ddpm_fast.kernels.step import step
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.kernels.to_uint8 import to_uint8

__all__ = ["normal", "q_sample", "q_step", "step", "threshold_bound", "to_uint8"]
