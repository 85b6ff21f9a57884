import io

import pytest
from questpress.pipeline.cli.main import fail
from questpress.pipeline.runs.console import Display, safe_console
from rich.table import Table
from rich.text import Text

NAME = "red\x1b]0;owned\x9b2J\u202ebd"
SHOWN = "red\\x1b]0;owned\\x9b2J\\u202ebd"


def test_table_cells_have_no_control_characters() -> None:
    file = io.StringIO()
    console = safe_console(file=file, width=120, color_system=None)
    drawn = Table(title=Text(NAME))
    drawn.add_column(Text(NAME))
    drawn.add_row(Text(NAME))
    console.print(drawn)
    console.print(Text(f"Note: {NAME}"), soft_wrap=True)
    told = file.getvalue()
    assert told.count(SHOWN) == 4 and f"Note: {SHOWN}\n" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


def test_own_colors_reach_the_terminal() -> None:
    file = io.StringIO()
    console = safe_console(file=file, width=80, force_terminal=True, color_system="standard", no_color=False)
    console.print("[green]fine[/green]")
    console.show_cursor(False)
    assert "\x1b[32mfine\x1b[0m" in file.getvalue() and "\x1b[?25l" in file.getvalue()


def test_name_without_end_makes_no_sentence_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"Error: {'x' * 1_000_000} is missing; give it.", 2)
    told = capsys.readouterr().err
    assert told.startswith("Error: xxx") and told.endswith("xxx is missing; give it.\n") and len(told) < 4100


def test_progress_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=False, verbose=True)
    with display.stage(NAME) as stage:
        display.print(NAME)
        display.note(NAME)
        display.warn(NAME)
        display.detail(NAME)
        display.done("teacher", NAME, 1.0)
        stage.update(NAME, 1, 2)
    with pytest.raises(SystemExit):
        fail(f"\nError: {NAME}", 2)
    told = capsys.readouterr().err
    assert told.count(SHOWN) == 6 and f"\nError: {SHOWN}\n" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


def test_progress_restarts_with_the_stage_and_with_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("questpress.pipeline.runs.console.time.monotonic", lambda: now[0])
    with Display(quiet=False).stage("student") as stage:

        def update(done: int) -> None:
            now[0] += 6
            stage.update("training resnet8", done, 100, "images")

        for done in (0, 50, 100):
            update(done)
        stage.name = "qat"  # trains the same network
        for done in (10, 20, 30):
            update(done)
        for done in (5, 10, 15):  # in smaller micro-batches
            update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  student: training resnet8: 100 %, 8 images/s, 0 s left",
        "  qat: training resnet8: 30 %, 2 images/s, 42 s left",
        "  qat: training resnet8: 15 %, 1 images/s, 102 s left",
    ]
