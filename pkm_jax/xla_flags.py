"""What users set of XLA's options, in the environment variable XLA_FLAGS."""

import os
import re


def xla_flags() -> dict[str, str]:
    """The values by name, '' of a flag without one; of a flag that is there twice the last."""
    return dict(re.findall(r'--(\w+)(?:=(\S+)|(?=\s|$))', os.environ.get('XLA_FLAGS', '')))
