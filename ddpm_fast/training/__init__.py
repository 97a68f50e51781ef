"""Training: the losses and a trainer that resumes."""

from ddpm_fast.training.trainer import Trainer, TrainingConfig

__all__ = ["Trainer", "TrainingConfig"]
