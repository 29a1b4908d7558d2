"""Output on consoles of any kind."""

import sys


def survive_any_console() -> None:
    """What a console's encoding lacks is written as its number, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):      # not where a notebook or a test took its place
            stream.reconfigure(errors='backslashreplace')
