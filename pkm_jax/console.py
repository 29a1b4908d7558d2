"""Output on consoles of any kind, and warnings that come once."""

import functools
import logging
import sys
from typing import Any


def survive_any_console() -> None:
    """What a console's encoding lacks is written as its number, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):      # not where a notebook or a test took its place
            stream.reconfigure(errors='backslashreplace')


@functools.cache
def warn_once(logger: str, message: str, *details: Any) -> None:
    """Logs a warning the first time that it is given."""
    logging.getLogger(logger).warning(message, *details)
