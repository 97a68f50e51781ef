"""The command line `ddpm-fast`."""

import signal
import threading
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; see `ddpm_fast.cli.parser.main`."""
    # Importing torch takes seconds, in which Ctrl-C shall end the process without a traceback; what the caller ignores
    # stays ignored.
    alone = threading.current_thread() is threading.main_thread()
    handled = alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ddpm_fast.cli import parser

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return parser.main(argv)
