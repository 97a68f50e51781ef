"""What a sampling loop is, one step at a time (`engine.loop`) or several (`speculation.loop`)."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.graph import can_capture
from ddpm_fast.engine.noise import Noise
from ddpm_fast.engine.progress import Show
from ddpm_fast.engine.report import Speculation
from ddpm_fast.engine.tf32 import tf32
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.table import Clipping, StepTable

KnownImage = tuple[Tensor, Tensor]


class SamplingLoop(ABC):
    """A sampling loop over the rows of a table, with a model on buffers that never move.

    Args:
        call: The model and what it is called with.
        table: The rows of the run.
        clipping: What happens to the x0 prediction.
        inference_mode: Whether the loop runs under torch.inference_mode, which spares the host work. A model that takes
            gradients inside, or keeps tensors to train on later, cannot run so.
        execution: How the loop is executed.

    Attributes:
        x: The state, float32 [B, C, ...]. It is a buffer: copy it.
        x0: The x0 prediction of the last step, where it is written.
        device, shape, backend: Device and shape of the batch; "triton" or "torch" kernels.
        mode: "auto", "graph" or "eager": how steps are executed from now on.
        seeds_only: Whether the noise must come from seeds.
        speculation: The report of the last run, if the loop drafts steps.

    Raises:
        ValueError: Graphs are asked for, but the device cannot record them.
    """

    seeds_only = False

    def __init__(
        self, call: Call, table: StepTable, clipping: Clipping, inference_mode: bool, execution: Execution
    ) -> None:
        self.call, self.table, self.clipping, self.execution = call, table, clipping, execution
        self.device, self.shape = call.device, call.shape
        if execution.execution == "graph" and not can_capture(self.device):
            raise ValueError(f"execution='graph' needs a CUDA device, got {self.device}")
        self.mode = execution.execution
        self.backend = choose_backend(self.device, execution.backend)
        self.x = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        self.x0: Tensor | None = None
        self.speculation: Speculation | None = None
        self._no_gradients = torch.inference_mode if inference_mode else torch.no_grad

    @abstractmethod
    def steps(
        self,
        noise: Noise,
        x_T: Tensor | None = None,
        *,
        known: KnownImage | None = None,
        previews: bool = False,
        every_step: bool = False,
        progress: Show = None,
    ) -> Iterator[int]:
        """Run the sampler. Yields the number of finished steps; the state is in `x`. The iterator may be abandoned.

        Args:
            noise: Source of x_T and of the steps' noise.
            x_T: Start of the run, [B, C, ...], instead of noise.
            known: An image and its mask, 1 where the image holds (`kernels.step`). A known image needs noise from
                seeds.
            previews: Whether the x0 prediction of the last step is written to `x0`.
            every_step: Whether to yield after every step, not only from time to time.
            progress: The progress bar (`ProgressBar`).

        Raises:
            ValueError: The loop cannot do what is asked for.
            FloatingPointError: The model returned NaN, or an infinity that no clipping bounds; says where.
            RuntimeError: A graph is demanded and the network cannot be captured.
        """

    @abstractmethod
    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """Replace the values of the model's keywords.

        Raises:
            ValueError: The keywords do not fit the ones that the loop was built with.
        """

    @abstractmethod
    def set_state(self, x: Tensor) -> None:
        """Replace the state between two steps: the next step starts from x, [B, C, ...]."""

    @abstractmethod
    def free(self) -> None:
        """Drop the recorded graphs."""

    def run(self, noise: Noise, x_T: Tensor | None = None, *, progress: Show = None) -> Tensor:
        """Run to the end and return a copy of x: float32 [B, C, ...]."""
        for _ in self.steps(noise, x_T, progress=progress):
            pass
        return self.x.clone()

    def _records(self) -> bool:
        """Return whether steps are to be recorded in graphs."""
        return self.mode != "eager" and can_capture(self.device)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Set the device, gradients and TF32 for the network and the steps."""
        allowed = self.execution.tf32 if self.device.type == "cuda" else None
        with on_device(self.device), self._no_gradients(), tf32(allowed):
            yield

    def _not_finite(self, where: str) -> str:
        """Return the message for a state that is not finite."""
        samples = (~torch.isfinite(self.x).flatten(1).all(1)).nonzero().flatten().tolist()
        batch = f"for sample {', '.join(map(str, samples[:5]))} of the batch"
        return f"the model returned NaN or infinity {where}, {batch}"
