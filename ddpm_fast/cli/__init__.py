"""The command line `ddpm-fast`."""

from ddpm_fast.cli.parser import main

__all__ = ["main"]
