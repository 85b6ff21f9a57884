"""What the documentation says is what the code does."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from questpress.pipeline.cli.main import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = ("benchmarks.", "tests.campaigns.")
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def code(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, fenced with no language or as a shell's, or indented by four."""
    fence = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in ("", "sh"):
            yield line
        elif fence is None and line.startswith("    "):
            yield line[4:]


def commands(page: Path) -> Iterator[list[str]]:
    """Each command line as a shell would split it, its variables replaced; several joined by && apart."""
    variables: dict[str, str] = {}
    for line in "\n".join(code(page)).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        if named := re.fullmatch(r'(\w+)="?([^"]*)"?', line.strip()):
            variables[named[1]] = named[2]
        for part in line.split("&&"):
            if re.match(r"\s*(compress|torchrun|taskset|python|\w+=\S+ compress)\s", part):
                # What stands further right is said of the command.
                yield shlex.split(re.split(r"\s{3,}", part.strip())[0], comments=True)


OURS = [
    pytest.param(words[words.index("compress") + 1 :], id=f"{page.stem}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in commands(page)
    if "compress" in words and "pip" not in words
]
BENCHMARKS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in commands(page)
    if any(word.startswith(SCRIPTS) for word in words)
]


def test_option_tables_in_the_docs_are_generated_from_the_code() -> None:
    check = [sys.executable, ROOT / ".ci" / "command-line", "--check"]
    assert subprocess.run(check, timeout=60).returncode == 0, "run .ci/command-line"


def test_there_are_commands_in_the_docs() -> None:
    assert len(OURS) > 40 and len(BENCHMARKS) > 10


@pytest.mark.parametrize("arguments", OURS)
def test_every_documented_command_parses(arguments: list[str]) -> None:
    before = ["", *arguments]
    # An ellipsis stands for more options, or for the value of the option before it.
    arguments = [
        word for last, word in zip(before, arguments, strict=False) if word != "…" or last[:2] == "--"
    ]
    command: click.Command = cli
    name = "compress"
    while True:
        context = command.make_context(name, list(arguments), resilient_parsing=False)
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        found, inner, arguments = command.resolve_command(context, rest)
        assert found is not None and inner is not None
        command, name = inner, found


@pytest.mark.parametrize("words", BENCHMARKS)
def test_every_benchmark_in_the_docs_is_there_with_its_options(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.startswith(SCRIPTS))
    scripts = [words[place]]
    known = ""
    for script in scripts:  # options may be shared
        file = ROOT.joinpath(*script.split(".")).with_suffix(".py")
        if script == words[place] or file.is_file():
            text = file.read_text(encoding="utf-8")
            known += text
            imported = re.findall(r"^from ([\w.]+) import", text, flags=re.M)
            scripts += [name for name in imported if name.startswith(SCRIPTS) and name not in scripts]
    own = words[place + 1 :]
    for word in own[: own.index("--")] if "--" in own else own:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in known, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text]
    assert not missing, missing
