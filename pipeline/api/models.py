"""List timm and CIFAR networks with sizes and licenses (`compress models`)."""

from rich.table import Table
from rich.text import Text

from ...models.catalogue import describe
from ...models.errors import ModelError, UnknownModel
from ...models.names import matching, nearest
from ..errors import UsageError
from ..runs.console import safe_console

COUNTED = 60
"""Up to so many networks are built (without memory) to count their parameters and GMACs."""


def list_models(pattern: str, image_size: int | None) -> None:
    """Print the networks that match.

    Raises:
        UsageError: none does.
    """
    names = matching(pattern)
    if not names:
        near = nearest(pattern.strip("*?"))
        advice = f" The nearest are {', '.join(near)}." if near else ""
        raise UsageError(f"No model matches '{pattern}'.{advice}")
    console = safe_console(highlight=False)
    if len(names) > COUNTED:
        for name in names:
            console.print(Text(name))
        console.print(
            f"{len(names)} networks; a narrower pattern ({COUNTED} or fewer) shows their sizes.", style="dim"
        )
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for column in ("parameters", "GMACs", "image size"):
        table.add_column(column, justify="right")
    table.add_column("pretrained weights")
    for name in names:
        try:
            entry = describe(name, image_size)
        except UnknownModel:
            raise
        except ModelError as error:
            table.add_row(Text(name), "", "", "", Text(str(error)))
            continue
        shown = entry.name if entry.name == name else f"{name} = {entry.name}"
        licence = (entry.licence or "licence not stated") if entry.has_weights else "none"
        table.add_row(
            Text(shown),
            f"{entry.parameters / 1e6:.2f} M",
            "–" if entry.gmacs is None else f"{entry.gmacs:.3f}",
            str(entry.image_size),
            licence,
        )
    console.print(table)
