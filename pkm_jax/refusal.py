"""What is raised where a person's input is at fault, and the exit statuses of the programs."""

import enum
import sys


class ExitStatus(enum.IntEnum):
    """Of every program here, one for each way to end that its caller may treat differently.

    128 and the number of a signal besides, where one stopped it. docs/reliability.md has the table.
    """
    DONE = 0
    FAILED = 1          # any other exception, with its traceback
    REFUSED = 2         # argparse's too
    DIVERGED = 3
    HUNG = 4
    OUT_OF_MEMORY = 5   # of a device
    CELLS_FAILED = 6    # some, of an ablation


class Refusal(ValueError):
    """Something that was handed in cannot be used; the message names it, its value and the remedy.

    Entry points print it in one line. Any other exception is a fault of the program, and they let
    its traceback through.
    """
    status = ExitStatus.REFUSED


class OutOfMemory(Refusal):
    """What was asked for has no room on a device."""
    status = ExitStatus.OUT_OF_MEMORY


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX's runtime or compilers says that a device has too little memory."""
    return 'RESOURCE_EXHAUSTED' in str(error)


def ends(said: str, status: ExitStatus = ExitStatus.REFUSED) -> SystemExit:
    """What a program raises to end with a line on standard error, and a status that is not 1."""
    print(said, file=sys.stderr)
    ending = SystemExit(said)
    ending.code = status
    return ending
