"""``python -m questpress.pipeline`` is ``compress``."""

from .cli.main import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="compress")


if __name__ == "__main__":
    main()
