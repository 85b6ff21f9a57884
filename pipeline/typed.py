"""What was typed, for reports that say how to repeat them."""

import shlex
import sys
from pathlib import Path


def command() -> str:
    """The command line of this process; a script's own path is of no use elsewhere."""
    return shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
