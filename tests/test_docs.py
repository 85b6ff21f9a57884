"""The commands, options, packages and files that documentation and messages name exist."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from questpress.pipeline.cli.main import COMMANDS as COMMAND_NAMES
from questpress.pipeline.cli.main import cli
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = ("benchmarks.", "tests.campaigns.")
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]


SOURCES = [
    file
    for folder in ("pipeline", "export", "models")
    for pattern in ("*.py", "*.md.j2")
    for file in sorted((ROOT / folder).rglob(pattern))
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
OTHER_TOOLS = {
    *("--artifact", "--self-test", "--provider", "--bench"),  # predict.py
    *("--onnx", "--fp16", "--shapes"),  # trtexec
    "--model",  # stedgeai
    "--backend-store-uri",  # mlflow
    "--body-file",  # gh
    "--force-reinstall",  # pip
    "--gpus-per-task",  # Slurm
    "--signal",  # Slurm
    "--logdir",  # tensorboard
    "--no-cache-dir",  # pip
    "--data-binary",  # curl
    "--local-dir",  # hf
    "--shm-size",  # docker
    "--no",  # the start of --no-flip and others
}
PROSE = {"can", "cannot", "has"}
"""Words after the program's name in sentences."""


def read_code(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks: fenced without a language or with `sh`, or indented by four spaces."""
    fence = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in ("", "sh"):
            yield line
        elif fence is None and line.startswith("    "):
            yield line[4:]


def read_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command, with shell variables replaced and `&&` split."""
    variables: dict[str, str] = {}
    for line in "\n".join(read_code(page)).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        if assignment := re.fullmatch(r'(\w+)="?([^"]*)"?', line.strip()):
            variables[assignment[1]] = assignment[2]
        for part in line.split("&&"):
            if re.match(r"\s*(compress|torchrun|taskset|python|\w+=\S+ compress)\s", part):
                # Text after three spaces describes the command.
                yield shlex.split(re.split(r"\s{3,}", part.strip())[0], comments=True)


COMMANDS = [
    pytest.param(words[words.index("compress") + 1 :], id=f"{page.stem}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in read_commands(page)
    if "compress" in words and "pip" not in words
]
SCRIPT_COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in read_commands(page)
    if any(word.startswith(SCRIPTS) for word in words)
]


def read_texts(path: Path) -> Iterator[str]:
    """Yield the strings of a module with an ellipsis for each value, or the code in a page's sentences."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from re.findall(r"`([^`\n]+)`", text)
        yield from re.findall(r"pip install [^&\n]+", text)
    elif path.suffix != ".py":
        yield text
    else:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def list_options(command: click.Command) -> set[str]:
    """Return the options of a command and of its subcommands."""
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        subcommands = [command.get_command(context, name) for name in command.list_commands(context)]
        options.update(*(list_options(subcommand) for subcommand in subcommands if subcommand is not None))
    return options


@pytest.fixture(scope="module")
def options() -> set[str]:
    """All options of our commands and scripts, and of torchrun."""
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests/campaigns").rglob("*.py")]
    own = {name for script in scripts for text in read_texts(script) for name in OPTION.findall(text)}
    torchrun = {name for action in get_args_parser()._actions for name in action.option_strings}
    return list_options(cli) | own | torchrun | OTHER_TOOLS | {"--help", "--version"}


def check_package(name: str) -> None:
    """Check that a name after ``pip install`` is a checkout with its extras, or a package of others."""
    if name.startswith("."):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert name == "." or name[2:-1] in project["optional-dependencies"], name
    else:
        assert Requirement(name).name != "questpress", name  # no index has it


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_options_and_packages_that_a_text_names_exist(path: Path, options: set[str]) -> None:
    names = {name for names in COMMAND_NAMES.values() for name in names}
    for text in read_texts(path):
        assert set(OPTION.findall(text)) <= options, text
        assert {*re.findall(r"\bcompress ([a-z]+)", text)} <= names | PROSE, text
        for name in re.findall(r"pip install (?:-\S+ )*['\"]?([\w.][\w.\[\]>=-]*)", text):
            check_package(name)


def test_option_tables_in_the_docs_are_generated_from_the_code() -> None:
    check = [sys.executable, ROOT / ".ci" / "command-line", "--check"]
    assert subprocess.run(check, timeout=60).returncode == 0, "run .ci/command-line"


def test_there_are_commands_in_the_docs() -> None:
    assert len(COMMANDS) > 40 and len(SCRIPT_COMMANDS) > 10


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_documented_command_parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("questpress.pipeline.cli.options.import_module", lambda _: None)
    # An ellipsis stands for the value of the option before it, otherwise for more options.
    previous = ["", *arguments]
    arguments = [
        word for last, word in zip(previous, arguments, strict=False) if word != "…" or last[:2] == "--"
    ]
    command: click.Command = cli
    name = "compress"
    while True:
        context = command.make_context(name, list(arguments), resilient_parsing=False)
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        subname, subcommand, arguments = command.resolve_command(context, rest)
        assert subname is not None and subcommand is not None
        command, name = subcommand, subname


@pytest.mark.parametrize("words", SCRIPT_COMMANDS)
def test_every_documented_script_exists_and_has_the_options(words: list[str]) -> None:
    start = next(i for i, word in enumerate(words) if word.startswith(SCRIPTS))
    scripts = [words[start]]
    source = ""
    for script in scripts:  # options may be defined in an imported module
        file = ROOT.joinpath(*script.split(".")).with_suffix(".py")
        if script == words[start] or file.is_file():
            text = file.read_text(encoding="utf-8")
            source += text
            imported = re.findall(r"^from ([\w.]+) import", text, flags=re.M)
            scripts += [name for name in imported if name.startswith(SCRIPTS) and name not in scripts]
    options = words[start + 1 :]
    for word in options[: options.index("--")] if "--" in options else options:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in source, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:benchmarks|export|models|pipeline|tests)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path


def test_readme_links_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if page.relative_to(ROOT).as_posix() not in text]
    assert not missing, missing
