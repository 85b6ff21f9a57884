"""What was typed, for reports that say how to repeat them."""

import shlex
import sys
from pathlib import Path


def command() -> str:
    """The command line of this process; a script's own path is of no use elsewhere."""
    name = Path(sys.argv[0]).name or "python"
    begun = ["python", "-m", "questpress.pipeline"] if name == "__main__.py" else [name]
    return shlex.join([*begun, *sys.argv[1:]])
