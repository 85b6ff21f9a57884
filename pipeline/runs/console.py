"""Terminal output: a line for each finished stage, and a progress bar for the running one."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ...export.text import escape_controls

PLAIN_SECONDS = 10.0
"""Interval of progress lines if the output is not a terminal."""

LOGGER = "questpress"
"""Parent of the loggers of all modules."""

THROUGHPUT_SECONDS = 15.0
"""Window of the throughput."""

FILE_WIDTH = 1000
"""Columns of output to a file or a pipe: no row is cut or wrapped."""

BAR_WIDTHS = (8, 24)
"""Columns of the progress bar in a narrow and in a wide terminal."""


def safe_console(**options: Any) -> Console:
    """Return a console that escapes control characters, which names of classes and files may contain."""
    console = Console(**options)
    if not console.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    console.push_render_hook(_EscapeHook())
    return console


class _EscapeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """A renderable with escaped text; its own colors and cursor movements are kept."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            if segment.control:
                yield segment
            else:
                yield Segment(escape_controls(segment.text, keep="\n"), segment.style)


class FittingTable(Table):
    """A table without lines that lists its rows in a terminal that is too narrow for its cells."""

    def __init__(self, **options: Any) -> None:
        super().__init__(box=None, padding=(0, 2, 0, 0), pad_edge=False, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[*column.cells] for column in self.columns]
        heads = [str(column.header) for column in self.columns]
        widths = [
            max(cell_len(str(text)) for text in (*column, *head.split(), ""))
            for head, column in zip(heads, cells, strict=True)
        ]
        room = options.max_width - sum(widths) - 2 * (len(widths) - 1)
        if room >= 0:
            for column, head, width in zip(self.columns, heads, widths, strict=True):
                column.width = min(max(width, cell_len(head)), width + room)  # otherwise the heading folds
                room -= column.width - width
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), self.title_style or "")
        for row, (name, *values) in zip(self.rows, zip(*cells, strict=True), strict=True):
            named = zip(heads[1:], values, strict=True)
            parts = (f"{head} {value}".strip() for head, value in named if value)
            yield Text(f"{name}: {'; '.join(parts)}", row.style or "")


class Display:
    """Writes to standard error, so that standard output holds the result alone.

    Colors follow the terminal, and the variables NO_COLOR and FORCE_COLOR (https://no-color.org).
    """

    def __init__(self, *, quiet: bool, verbose: bool = False) -> None:
        self.console = safe_console(stderr=True, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.verbose = verbose and not quiet
        self.warnings: list[str] = []

    def print(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a note on a default or an option without effect."""
        self.console.print(f"[dim]  note: {escape(text)}[/dim]", soft_wrap=True)

    def detail(self, text: str) -> None:
        """Print a line with --verbose only."""
        if self.verbose:
            self.console.print(f"[dim]  {escape(text)}[/dim]", soft_wrap=True)

    @contextmanager
    def show_logs(self) -> Iterator[None]:
        """Print the messages of questpress's loggers as details during the block."""
        if not self.verbose:
            yield
            return
        logger, handler = logging.getLogger(LOGGER), _DetailHandler(self)
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    def warn(self, text: str) -> None:
        """Print a warning, which is added to the report too."""
        self.warnings.append(text)
        self.console.print(f"[yellow]  warning: {escape(text)}[/yellow]", soft_wrap=True)

    def done(self, stage: str, summary: str, seconds: float | None) -> None:
        """Print the line of a finished stage; ``seconds`` is None if it was finished before."""
        took = "kept" if seconds is None else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
        self.console.print(
            f"[green]✓[/green] [bold]{stage:<9}[/bold] {escape(summary)} [dim]({took})[/dim]", soft_wrap=True
        )

    @contextmanager
    def stage(self, name: str) -> Iterator["StageProgress"]:
        """Show the progress of a stage during the block."""
        if not self.live:
            yield StageProgress(self, name, None)
            return
        with _ProgressLine(console=self.console, transient=True) as progress:
            yield StageProgress(self, name, progress)


class _ProgressLine(Progress):
    """A progress bar in one line: in a narrow terminal losses go first, then the work's name and the rate."""

    spinner = SpinnerColumn()

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = Table.grid(padding=(0, 1), pad_edge=False)
        for task in tasks:
            stage = Text(f"{task.fields['stage']:<9}", "bold")
            percent = Text(f"{task.percentage:>3.0f}%")
            left = TimeRemainingColumn().render(task)
            bar, widest = BAR_WIDTHS
            room = self.console.width - stage.cell_len - percent.cell_len - left.cell_len - bar - 9
            rate = Text(task.fields["throughput"] if len(task.fields["throughput"]) <= room else "")
            room -= rate.cell_len
            work = _shorten(Text(task.description), room)
            room -= work.cell_len
            wider = max(0, min(widest - bar, room))
            losses = _shorten(Text(task.fields["more"], "dim"), room - wider)
            drawn = BarColumn(bar + wider).render(task)
            table.add_row(self.spinner.render(task), stage, work, drawn, percent, rate, left, losses)
        return table


def _shorten(text: Text, room: int) -> Text:
    text.truncate(max(1, room), overflow="ellipsis")
    return text if room > 1 else Text()


class _DetailHandler(logging.Handler):
    """Prints each record as a detail, with the last line of its exception."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
        self.display.detail(text)


class StageProgress:
    """The progress of one stage: one step at a time, with throughput and remaining time."""

    def __init__(self, display: Display, name: str, progress: Progress | None) -> None:
        self.display = display
        self.name = name
        self.progress = progress
        self.task: TaskID | None = None
        self.work: tuple[str, str] | None = None
        self.last_print = 0.0
        self.samples: deque[tuple[float, float]] = deque()

    def update(
        self, work: str, done: float, total: float, unit: str = "", more: str = "", scale: int = 1
    ) -> None:
        """Show that ``done`` of ``total`` are done, each of which counts as ``scale`` units of throughput."""
        now = time.monotonic()
        # Two stages may do work of the same name, and work may restart from an earlier state.
        if (self.name, work) != self.work or (self.samples and done < self.samples[-1][1]):
            self.work, self.last_print = (self.name, work), now
            self.samples.clear()
            if self.progress is not None:
                if self.task is not None:
                    self.progress.remove_task(self.task)
                self.task = self.progress.add_task(work, total=total, stage=self.name, throughput="", more="")
        rate = self._compute_rate(now, done)
        throughput = f"{rate * scale:,.0f} {unit}/s" if unit and rate else ""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, throughput=throughput, more=more)
        elif now - self.last_print >= PLAIN_SECONDS and rate:
            self.last_print = now
            left = (total - done) / rate
            parts = f"{100 * done / total:.0f} %", throughput, f"{left:.0f} s left", more
            self.display.print(f"  {self.name}: {work}: {', '.join(filter(None, parts))}")

    def _compute_rate(self, now: float, done: float) -> float:
        """Return the work done per second over the last seconds, so that a stall shows for a short time."""
        self.samples.append((now, done))
        while len(self.samples) > 2 and now - self.samples[1][0] > THROUGHPUT_SECONDS:
            self.samples.popleft()
        start, before = self.samples[0]
        return (done - before) / (now - start) if now > start else 0.0
