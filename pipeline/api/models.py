"""List networks with their sizes and licenses (`compress models`)."""

from ...models.catalogue import Entry, describe
from ...models.errors import ModelError, UnknownModel
from ...models.names import find_matching, find_nearest
from ..errors import UsageError

MAX_DESCRIBED = 60
"""Number of networks that are built (without memory) to count their parameters and GMACs."""


def list_models(pattern: str = "*", image_size: int | None = None) -> dict[str, Entry | str | None]:
    """Return the networks whose name matches ``pattern``.

    Returns:
        Each name with its description, the reason that it cannot be described, or None if more than
        ``MAX_DESCRIBED`` networks match.

    Raises:
        UsageError: no network matches.
    """
    names = find_matching(pattern)
    if not names:
        near = find_nearest(pattern.strip("*?"))
        advice = f" The nearest are {', '.join(near)}." if near else ""
        raise UsageError(f"No model matches '{pattern}'.{advice}")
    if len(names) > MAX_DESCRIBED:
        return dict.fromkeys(names)
    return {name: _describe(name, image_size) for name in names}


def _describe(name: str, image_size: int | None) -> Entry | str:
    try:
        return describe(name, image_size)
    except UnknownModel:
        raise
    except ModelError as error:
        return str(error)
