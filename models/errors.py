"""Errors of building a model and loading its weights, and what their messages contain."""

Size = int | tuple[int, int]
"""Pixels: the side of a square, or height and width of another rectangle."""


class ModelError(Exception):
    """A model cannot be built, or its weights are not available or do not fit (a failed job, exit code 1)."""

    exit_code = 1


class UnknownModel(ModelError):
    """timm has no model of this name, or it cannot be used in this role (wrong usage, exit code 2)."""

    exit_code = 2


def shorten(error: BaseException) -> str:
    """Return the message of another library's error on one line, without a final period."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"


def show_size(image_size: Size) -> str:
    """Return a size as on the command line: `224`, or `96x36` for height and width."""
    return str(image_size) if isinstance(image_size, int) else "x".join(map(str, image_size))
