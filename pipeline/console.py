"""Where text for people goes: rich's console, in which no text from outside steers the terminal."""

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from ..export.text import spelled_out


def safe_console(**options: Any) -> Console:
    """Rich's console with these options. What it is given to print may hold the names of classes and files of
    whoever made them: characters that would steer the terminal are spelled out.
    """
    made = Console(**options)
    made.push_render_hook(_Spelling())
    return made


class _Spelling(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_SpelledOut(one) for one in renderables]


class _SpelledOut:
    """What another renderable shows, its own colours and movements aside spelled out."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            if segment.control:
                yield segment
            else:
                yield Segment(spelled_out(segment.text, but="\n"), segment.style)
