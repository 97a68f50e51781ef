"""Command lines of the benchmarks."""

import argparse
from pathlib import Path

from benchmarks.common.results import FOLDER


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the docstring of a module as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_result_options(parser: argparse.ArgumentParser, folder: Path | None = FOLDER) -> None:
    """Add --out and --commit.

    Args:
        parser: The parser that gets the options.
        folder: The default of --out.
    """
    parser.add_argument("--out", type=Path, default=folder, help="folder for the result (default: benchmarks/results)")
    parser.add_argument("--commit", help="output of `git describe --always --dirty`, for a machine without git")
