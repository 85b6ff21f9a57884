"""``python -m questpress.pipeline`` and ``questpress`` are ``compress``."""

import sys
from pathlib import Path

from .cli.main import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="questpress" if Path(sys.argv[0]).stem == "questpress" else "compress")


if __name__ == "__main__":
    main()
