"""Cost and origin of a model for the list of models; nothing is downloaded or allocated."""

from dataclasses import dataclass

from .build import create_network, default_image_size, pretrained_cfg
from .errors import ModelError, UnknownModel
from .names import ALIASES, find_matching, find_nearest, resolve
from .pretrained import find_license, has_pretrained

MAX_DESCRIBED = 60
"""Models that are built, without memory, to count their parameters and multiply-adds."""


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    name: str
    alias: str | None
    parameters: int
    """With the classes of the published weights."""
    gmacs: float | None
    """Billions of multiply-adds for one image; None if they cannot be counted."""
    image_size: int
    license: str | None
    """License of the published weights."""
    has_weights: bool


def describe(name: str, image_size: int | None = None) -> Entry:
    """Count parameters and multiply-adds of a model at `image_size` pixels (its default size if None).

    Runs on torch's meta device: shapes only, well under a second. Raises UnknownModel, ModelError.
    """
    full = resolve(name)
    size = image_size or default_image_size(full)
    parameters, gmacs = _cost(full, size)
    return Entry(
        name=full,
        alias=name if name in ALIASES else None,
        parameters=parameters,
        gmacs=gmacs,
        image_size=size,
        license=find_license(full),
        has_weights=has_pretrained(full),
    )


def multiply_adds(name: str, image_size: int, classes: int) -> float | None:
    """Count billions of multiply-adds for one image; None if they cannot be counted.

    Raises UnknownModel, ModelError.
    """
    return _cost(resolve(name), image_size, classes)[1]


def _cost(full: str, image_size: int, classes: int | None = None) -> tuple[int, float | None]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = create_network(full, classes or int(pretrained_cfg(full).num_classes), image_size).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            network(torch.empty(1, 3, image_size, image_size, device="meta"))
    except ModelError:
        raise
    except Exception:  # the operations of a few networks have no shapes-only form, or they refuse this size
        return parameters, None
    return parameters, counter.get_total_flops() / 2 / 1e9


def list_models(pattern: str = "*", image_size: int | None = None) -> dict[str, Entry | str | None]:
    """Describe the models whose name matches `pattern`.

    Returns each name with its description, the reason that it has none, or None if more than `MAX_DESCRIBED`
    models match. Raises UnknownModel if no model matches.
    """
    names = find_matching(pattern)
    if not names:
        near = find_nearest(pattern.strip("*?"))
        advice = f" The nearest are {', '.join(near)}." if near else ""
        raise UnknownModel(f"No model matches '{pattern}'.{advice}")
    if len(names) > MAX_DESCRIBED:
        return dict.fromkeys(names)
    return {name: _describe_or_explain(name, image_size) for name in names}


def _describe_or_explain(name: str, image_size: int | None) -> Entry | str:
    try:
        return describe(name, image_size)
    except UnknownModel:
        raise
    except ModelError as error:
        return str(error)
