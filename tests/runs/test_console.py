import io

import pytest
from questpress.pipeline.cli.main import fail
from questpress.pipeline.runs.console import Display, FittingTable, safe_console
from rich.console import Console
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
    output = file.getvalue()
    assert output.count(SHOWN) == 4 and f"Note: {SHOWN}\n" in output
    assert all(letter.isprintable() or letter == "\n" for letter in output)


def test_own_colors_reach_the_terminal() -> None:
    file = io.StringIO()
    console = safe_console(file=file, width=80, force_terminal=True, color_system="standard", no_color=False)
    console.print("[green]fine[/green]")
    console.show_cursor(False)
    assert "\x1b[32mfine\x1b[0m" in file.getvalue() and "\x1b[?25l" in file.getvalue()


def test_name_without_end_makes_no_sentence_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"Error: {'x' * 1_000_000} is missing; give it.", 2)
    output = capsys.readouterr().err
    assert (
        output.startswith("Error: xxx")
        and output.endswith("xxx is missing; give it.\n")
        and len(output) < 4100
    )


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
    output = capsys.readouterr().err
    assert output.count(SHOWN) == 6 and f"\nError: {SHOWN}\n" in output
    assert all(letter.isprintable() or letter == "\n" for letter in output)


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


def progress_line(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the line of a training at 40 of 100 steps and 2 steps a second."""
    now = [0.0]
    monkeypatch.setattr("questpress.pipeline.runs.console.time.monotonic", lambda: now[0])
    display = Display(quiet=False)
    display.console = safe_console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display.live = True
    with display.stage("student") as stage:
        assert stage.progress is not None
        stage.progress.get_time = lambda: now[0]  # type: ignore[method-assign]
        for done in range(41):
            now[0] = done / 2
            losses = "epoch 3/10  loss 2.314  quest 1.203  ce 0.993"
            stage.update("training tf_efficientnet_lite0", done, 100, "images", losses, 600)
        file = io.StringIO()
        Console(file=file, width=width, color_system=None).print(stage.progress.get_renderable())
    return file.getvalue().rstrip()


def test_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {width: progress_line(width, monkeypatch) for width in (60, 80, 160)}
    for width, line in widths.items():
        assert len(line) <= width and "\n" not in line
        for part in ("student ", "training", "━━━", " 40% ", " 1,200 images/s ", " 0:00:30"):
            assert part in line, (width, part, line)
    assert "loss" not in widths[80] and "tf_efficientnet" in widths[80]
    assert widths[160].endswith("epoch 3/10  loss 2.314  quest 1.203  ce 0.993")
    narrow = progress_line(40, monkeypatch)
    assert all(part in narrow for part in ("student ", "━━━", " 40% ", " 0:00:30")) and len(narrow) <= 40


def test_output_to_a_file_is_not_cut() -> None:
    console = safe_console(file=io.StringIO(), color_system=None)
    assert console.width == 1000


def test_narrow_terminal_lists_the_rows_of_a_table() -> None:
    table = FittingTable(title=Text("Sizes"))
    for name in ("name", "image size", "pretrained weights"):
        table.add_column(Text(name))
    table.add_row(Text("mobilenetv4_conv_small"), Text("224"), Text("apache-2.0"))
    shown = {}
    for width in (80, 60, 40):
        file = io.StringIO()
        Console(file=file, width=width, color_system=None).print(table)
        shown[width] = [line.split() for line in file.getvalue().splitlines()]
    assert shown[80][1] == ["name", "image", "size", "pretrained", "weights"]
    assert shown[60][1:] == shown[80][1:]
    name, *words = [word for line in shown[40][1:] for word in line]
    assert (name, " ".join(words)) == (
        "mobilenetv4_conv_small:", "image size 224; pretrained weights apache-2.0",
    )  # fmt: skip
