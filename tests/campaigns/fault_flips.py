"""Damaged bytes: each file of a finished run, of one that was killed in its training, and of their cache."""

import random
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, Case, judged, kept
from tests.campaigns.small_run import PAGES, differences, left_by, pictures, run_options, start

VERBS = ("compress", "report", "validate", "predict", "compare")
DAMAGES = ("flip", "flip again", "cut", "empty")


def damage(file: Path, how: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "empty" or not content:
        content = bytearray() if content else bytearray(b"\0")
    elif how == "cut":
        del content[draw.randrange(len(content)) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def command(verb: str, data: Path, out: Path) -> tuple[str, ...]:
    """A command about the run in ``out``; its results go beside it."""
    run = str(out / "run")
    return {
        "compress": run_options(data, out, "--quiet"),
        "report": ("report", run, "--out", str(out / "report")),
        "validate": ("validate", run, "--out", str(out / "validation"), "--quiet", "--threads", "1"),
        "predict": ("predict", run, str(next((data / "red").iterdir())), "--json", "--threads", "1"),
        "compare": ("compare", run, run, "--out", str(out / "comparison")),
    }[verb]


def run(arguments: tuple[str, ...], told: Path) -> tuple[int | None, str, bytes]:
    """Exit code, standard error and standard output."""
    process = start(arguments, told)
    process.join()
    return process.exitcode, Path(f"{told}.err").read_text(), Path(f"{told}.out").read_bytes()


def cases(work: Path, seed: int) -> Iterator[Case]:
    data = pictures(work / "pictures")
    # Always in the same place, which the pages name.
    place, told = work / "case", work / "told"
    place.mkdir()
    killed = _killed(data, place, told, work / "killed")
    code, said, _ = run(run_options(data, place, "--quiet"), told)
    if code:
        raise SystemExit(said)
    expected = left_by(place)
    finished = Path(shutil.copytree(place, work / "finished"))
    results = {verb: _result(verb, data, finished, place, told) for verb in VERBS[1:]}
    for base, verbs in ((finished, VERBS), (killed, ("compress", "report"))):
        for file in sorted(one for one in base.rglob("*") if one.is_file()):
            name = file.relative_to(base).as_posix()
            if name.endswith(".lock") or (base is finished and name.startswith("cache/")):
                continue  # a finished run wants nothing of the cache
            in_cache = name.startswith("cache/")
            for verb in ("compress",) if in_cache else verbs:
                for how in DAMAGES[::2] if in_cache else DAMAGES:
                    yield Case(
                        f"{base.name} {name if not in_cache else _of_cache(name)} {how} {verb}",
                        f"{base.name}: {_general(name)}",
                        verb,
                        partial(_try, data, base, place, told, name, how, verb, seed, expected, results),
                    )
    for base, pattern, what in (
        (killed, "run/checkpoint/*", "both checkpoints"),
        (finished, "run/*run.json", "run.json and its copy"),
    ):
        fault = partial(_try, data, base, place, told, pattern, "flip", "compress", seed, expected, results)
        yield Case(f"{base.name} {what}", f"{base.name}: {what}", "compress", fault)


def _of_cache(name: str) -> str:
    """An entry of the cache has a name that hangs on the version of everything."""
    _, kind, key, *rest = name.split("/")
    return f"cache/{kind}/{key[:8]}/{'/'.join(rest)}"


def _general(name: str) -> str:
    if name.startswith("cache/"):
        return f"cache, {name.split('/')[1]}"
    return name.removeprefix("run/")


def _killed(data: Path, place: Path, told: Path, copy: Path) -> Path:
    """A run that was killed in its student's training, with two checkpoints."""
    process = start(run_options(data, place, "--quiet"), told)
    curve = place / "run" / "metrics.jsonl"
    while not (curve.exists() and '"student","epoch":2' in curve.read_text().replace(": ", ":")):
        if not process.is_alive():
            raise SystemExit(Path(f"{told}.err").read_text())
        time.sleep(0.001)
    process.kill()
    process.join()
    return Path(shutil.copytree(place, copy))


def _result(verb: str, data: Path, base: Path, place: Path, told: Path) -> dict[str, bytes]:
    """What a command leaves without damage: its files, and what it prints."""
    _set_up(base, place)
    code, said, printed = run(command(verb, data, place), told)
    if code:
        raise SystemExit(said)
    return {**_files_beside(place), "printed": printed}


def _files_beside(place: Path) -> dict[str, bytes]:
    return {
        file.relative_to(place).as_posix(): file.read_bytes()
        for name in ("report", "validation", "comparison")
        for file in sorted((place / name).rglob("*"))
        if file.is_file()
    }


def _set_up(base: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place)


def _try(
    data: Path,
    base: Path,
    place: Path,
    told: Path,
    name: str,
    how: str,
    verb: str,
    seed: int,
    expected: dict[str, object],
    results: dict[str, dict[str, bytes]],
) -> tuple[str, str]:
    _set_up(base, place)
    draw = random.Random(f"{seed} {base.name} {name} {how} {verb}")
    files = sorted(place.glob(name))
    for file in files:
        damage(file, how, draw)
    names = [file.relative_to(place).as_posix() for file in files]
    before = {key: content for key, content in kept(place).items() if key not in names}
    code, said, printed = run(command(verb, data, place), told)
    verdict, sentence = judged(code, said, before, place, None)
    if verdict != EQUAL:
        return verdict, sentence
    if verb == "compress":
        return _healed(place, base, names, expected)
    if base.name == "killed":
        return verdict, ""  # there is no report to compare with: that it was written is all
    found = {**_files_beside(place), "printed": printed}
    differs = [key for key, content in results[verb].items() if found.get(key) != content]
    return (DEFECT, f"differ: {', '.join(differs)}") if differs else (EQUAL, "")


def _healed(place: Path, base: Path, names: list[str], expected: dict[str, object]) -> tuple[str, str]:
    """Whether all is as in the uninterrupted run, the damaged files too."""
    # An entry of the cache that was not wanted has not been read.
    unread = [name.split("/")[2] for name in names if name.startswith("cache/")]
    differs = [one for one in differences(left_by(place), expected) if not any(key in one for key in unread)]
    for name in names:
        page = name.removeprefix("run/")
        shown = page in PAGES and page != "bench/latency.npz" and base.name == "finished"
        if shown and (place / name).read_bytes() != (base / name).read_bytes():
            differs.append(name)
    return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, "")
