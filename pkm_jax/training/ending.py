"""How a program that trains ends: what there is to say, in a line, and its exit status."""

import contextlib
import sys
from collections.abc import Iterator

from absl import logging

from pkm_jax.console import survive_any_console
from pkm_jax.processes import hosts
from pkm_jax.processes.preemption import Stopped
from pkm_jax.refusal import ExitStatus, Refusal, ends
from pkm_jax.training.divergence import Diverged


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Says in a line why the training within could not go on, and ends the program.

    Its status is one of `ExitStatus` (HUNG comes from `processes.watch`), or 128 and the signal
    where one stopped it. Beside other processes one that fails ends soon, whatever these wait for.
    """
    survive_any_console()
    logging.set_verbosity(logging.WARNING)      # libraries say much that is not about the run
    try:
        yield
    except Refusal as refusal:
        hosts.end_soon(refusal.status)
        raise ends(f'Not trained: {refusal}', refusal.status) from refusal
    except Diverged as diverged:
        hosts.end_soon(diverged.status)
        raise ends(f'Stopped: {diverged}', diverged.status) from diverged
    except Stopped as stopped:
        print(stopped)
        sys.exit(stopped.status)
    except Exception:
        hosts.end_soon(ExitStatus.FAILED)
        raise
