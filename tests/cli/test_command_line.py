"""The command line itself: its help, its shorthand, and what it imports."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
from questpress.pipeline.cli.main import COMMANDS, cli
from questpress.pipeline.config import defaults
from questpress.pipeline.config.options import GROUPS, Options, get_flag, get_group

from tests.support import little
from tests.support.little import command, compress, python

HEAVY = "{'torch', 'timm', 'torchvision', 'onnx', 'onnxruntime', 'sklearn', 'faiss', 'matplotlib', 'numpy'}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["predict", "--help"], ["models", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from questpress.pipeline.cli.main import cli\n"
        "try: cli(sys.argv[1:], prog_name='compress')\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)))"
    )
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert "heavy: []" in result.stdout, result.stdout[-200:]


def test_help_lists_every_option_under_its_heading():
    help_text = compress("run", "--help").stdout
    places = [help_text.index(f"{name}:") for name in GROUPS]
    assert places == sorted(places)
    for name in Options.model_fields:
        flag = get_flag(name)
        match = re.search(rf"^  {flag}(?![\w-])", help_text, re.MULTILINE)
        assert match is not None, flag
        at = match.start()
        heading = [name for name, place in zip(GROUPS, places, strict=True) if place < at][-1]
        assert heading == get_group(name), flag


@pytest.mark.parametrize("name", [name for named in COMMANDS.values() for name in named])
def test_every_command_and_option_has_help(name):
    little.check_success(compress(name, "--help"))
    made = cli.get_command(click.Context(cli), name)
    parts = made.commands.values() if isinstance(made, click.Group) else [made]
    for part in parts:
        shown = little.check_success(compress(name, *([part.name] if part is not made else []), "--help"))
        for parameter in part.params:
            is_option = isinstance(parameter, click.Option)
            assert (parameter.opts[0] if is_option else parameter.human_readable_name) in shown.stdout


def test_help_of_export_shows_no_defaults_of_options_it_does_not_have():
    assert "Defaults (" not in compress("export", "--help").stdout


def test_help_shows_the_table_of_defaults_in_lines_that_fit():
    lines = compress("run", "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 110
    help_text = " ".join(" ".join(lines).split())
    for row in defaults.TABLE:
        assert row.option in help_text
        assert row.scratch in help_text


def test_options_without_a_command_go_to_run(data, tmp_path):
    given = (*little.NETWORKS, *little.SMALL, "--data", data, "--out", tmp_path / "run", "--dry-run")
    short, long = compress(*given), compress("run", *given)
    assert short.exit_code == long.exit_code == 0
    assert short.stderr.splitlines()[:-1] == long.stderr.splitlines()[:-1]


def test_installed_command_is_the_modules():
    entries = {e.name: e.value for e in metadata.entry_points(group="console_scripts")}
    assert entries["compress"] == entries["questpress"] == "questpress.pipeline.__main__:main"


@pytest.mark.parametrize("name", ["compress", "questpress"])
def test_help_names_the_command_that_was_called(name):
    code = "import sys\nfrom questpress.pipeline.__main__ import main\nsys.argv[0] = sys.argv.pop(1)\nmain()"
    assert python(code, f"/usr/bin/{name}", "--help").stdout.startswith(f"Usage: {name} ")


def test_version_is_that_of_the_package():
    assert metadata.version("questpress") in compress("--version").stdout


def test_models_lists_names_parameters_and_gmacs():
    result = compress("models", "cifar_resnet8*")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert set(rows) == {"cifar_resnet8", "cifar_resnet8x4"}
    assert "0.08 M" in rows["cifar_resnet8"] and "0.01" in rows["cifar_resnet8"]
    assert "1.23 M" in rows["cifar_resnet8x4"]


def test_models_without_a_pattern_lists_names_alone():
    names = little.check_success(compress("models")).stdout.splitlines()
    assert len(names) > 500 and "resnet50" in names


def test_importing_the_package_does_not_import_torch():
    result = python(
        "import sys, questpress.pipeline, questpress.pipeline.cli.main, questpress.export.runtime\n"
        "assert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compress exp", ["export"]),
        ("compress run --met", ["--method"]),
        ("compress --teacher-w", ["--teacher-weights", "--teacher-warmup-epochs"]),
        ("compress run --method qu", ["quest"]),
        ("compress run --method quest+k", ["quest+kd"]),
        ("compress run --recipe cqkd-i", ["cqkd-imagenet"]),
        ("compress run --target x86-", ["x86-vnni"]),
    ],
)
def test_shell_is_offered_commands_options_and_their_values(words, offered):
    result = python(
        "from questpress.pipeline.__main__ import main; main()",
        _COMPRESS_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert [line.split(",")[1] for line in result.stdout.split()] == offered, result.stderr


def test_misspelled_command_gets_a_suggestion():
    result = compress("exprt", "runs/shop")
    assert result.exit_code == 2
    assert "Unknown command 'exprt'. Did you mean export?" in result.stderr


def test_no_color_disables_colors():
    code = "from questpress.pipeline.runs.console import Display\nDisplay(quiet=False).warn('a color')"
    colored = python(code, FORCE_COLOR="1", NO_COLOR="")
    plain = python(code, FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[33m" in colored.stderr
    assert "\x1b[3" not in plain.stderr and "warning: a color" in plain.stderr


def test_verbose_shows_defaults_and_epochs(data, cache, tmp_path):
    stderr = little.job(data, tmp_path / "run", cache, "--until", "teacher", "--verbose").stderr
    assert "defaults: " in stderr and "--optimizer adamw" in stderr and "--image-size" not in stderr
    epochs = [line.strip() for line in stderr.splitlines() if line.strip().startswith("teacher epoch ")]
    assert [line.split(":")[0] for line in epochs] == ["teacher epoch 1/2", "teacher epoch 2/2"]
    report = little.report(tmp_path / "run")
    assert f"loss {report['epochs'][0]['losses']['loss']:.4g}" in epochs[0]


@pytest.mark.parametrize("command", [["predict", "RUN", "photo.jpg"], ["bench", "RUN"], ["validate", "RUN"]])
def test_unfinished_run_is_reported(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"schema_version": 1, "stages": {}}')
    result = compress(*(str(tmp_path / "run") if word == "RUN" else word for word in command))
    little.refused(result, 2, "is an unfinished run without an artifact. Run the original command again.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_broken_stdout_is_reported(finished, data):
    image = data / "red" / "000.png"
    predict = [sys.executable, str(finished / "artifact" / "predict.py")]
    for arguments in (command("report", finished, "--json"), [*predict, str(image)]):
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert "No space left" in result.stderr
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *predict, str(image)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert closed.stderr == ""


NETWORK = """
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet


@register_model
def narrow_resnet(pretrained=False, **options):
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 24), num_classes=options["num_classes"])
"""


def test_network_of_an_own_module_becomes_an_artifact(data, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_networks.py").write_text(NETWORK)
    options = ("--student", "narrow_resnet", "--until", "export")
    little.refused(little.job(data, tmp_path / "a", cache, *options), 2, "narrow_resnet")
    little.check_success(little.job(data, tmp_path / "a", cache, *options, "--import", "my_networks"))
    assert (tmp_path / "a" / "artifact" / "student.onnx").stat().st_size < 200_000


@pytest.mark.parametrize(("module", "reason"), [("no_module", "No module"), ("broken", "division by zero")])
def test_own_module_that_cannot_be_imported_is_refused(module, reason, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken.py").write_text("1 / 0")
    result = compress("--import", module, "--teacher", "resnet18", "--student", "resnet18", "--data", data)
    little.refused(result, 2, f"--import {module}", reason)
