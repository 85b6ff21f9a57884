"""The small table a run ends with in the terminal."""

from rich.table import Table
from rich.text import Text

from ..results import Report
from . import figures
from .headline import accuracy_in_words
from .subjects import compared, threads


def table(report: Report) -> Table:
    """A row per network: accuracy with its 95 % interval, size, median latency at each thread count.

    Names are shown as they are: nothing in them is taken for markup.
    """
    counts = threads(report)
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    drawn.add_column("")
    drawn.add_column("network", overflow="fold")
    drawn.add_column("accuracy (95 % interval)", justify="right")
    drawn.add_column("size", justify="right")
    for count in counts:
        drawn.add_column(f"latency, {figures.threads(count)}", justify="right")
    for column in compared(report):
        network = column.subject
        latencies = (network.latency_ms.get(count) for count in counts)
        drawn.add_row(
            column.role,
            Text(network.name),
            accuracy_in_words(network.accuracy),
            figures.megabytes(network.bytes),
            *(figures.milliseconds(one.p50 if one else None) for one in latencies),
            style="bold" if column.key == "student_int8" else "",
        )
    return drawn
