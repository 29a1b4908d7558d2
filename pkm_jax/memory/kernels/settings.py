"""What a process's environment asks of kernels, which are chosen where programs are lowered."""

import os

from pkm_jax.refusal import Refusal


def is_on(setting: str, one: str, zero: str) -> bool:
    """Whether a variable of the environment is '1'; without it, or empty, it is '0'.

    `one` and `zero` say what the two values have done.

    Raises:
      Refusal: it is neither.
    """
    asked = os.environ.get(setting) or '0'
    if asked not in ('0', '1'):
        raise Refusal(f'{setting}={asked}: 1 has {one}, 0 {zero}.')
    return asked == '1'
