"""Damaged files of a finished run, of a run that was killed in training, and of their cache."""

import random
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.campaigns.fault_cases import DEFECT, EQUAL, Case, judge, read_files
from tests.campaigns.small_run import (
    PAGES,
    find_differences,
    make_images,
    read_results,
    run_options,
    save_each_step,
    start,
)

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
    """Return the arguments of a command on the run in ``out``, with its results next to the run."""
    run = str(out / "run")
    return {
        "compress": run_options(data, out, "--quiet"),
        "report": ("report", run, "--out", str(out / "report")),
        "validate": ("validate", run, "--out", str(out / "validation"), "--quiet", "--threads", "1"),
        "predict": ("predict", run, str(next((data / "red").iterdir())), "--json", "--threads", "1"),
        "compare": ("compare", run, run, "--out", str(out / "comparison")),
    }[verb]


def run(arguments: tuple[str, ...], log: Path) -> tuple[int | None, str, bytes]:
    """Return exit code, standard error and standard output."""
    process = start(arguments, log)
    process.join()
    return process.exitcode, Path(f"{log}.err").read_text(), Path(f"{log}.out").read_bytes()


def cases(work: Path, seed: int) -> Iterator[Case]:
    data = make_images(work / "pictures")
    # Always the same path, since pages contain it.
    place, log = work / "case", work / "log"
    place.mkdir()
    killed = _kill_in_training(data, place, log, work / "killed")
    code, errors, _ = run(run_options(data, place, "--quiet"), log)
    if code:
        raise SystemExit(errors)
    expected = read_results(place)
    finished = Path(shutil.copytree(place, work / "finished"))
    results = {verb: _run_undamaged(verb, data, finished, place, log) for verb in VERBS[1:]}
    for base, verbs in ((finished, VERBS), (killed, ("compress", "report"))):
        for file in sorted(path for path in base.rglob("*") if path.is_file()):
            name = file.relative_to(base).as_posix()
            if name.endswith(".lock") or (base is finished and name.startswith("cache/")):
                continue  # a finished run does not read the cache
            in_cache = name.startswith("cache/")
            for verb in ("compress",) if in_cache else verbs:
                for how in DAMAGES[::2] if in_cache else DAMAGES:
                    yield Case(
                        f"{base.name} {name if not in_cache else _shorten_key(name)} {how} {verb}",
                        f"{base.name}: {_generalize(name)}",
                        verb,
                        partial(_try, data, base, place, log, name, how, verb, seed, expected, results),
                    )
    for base, pattern, what in (
        (killed, "run/checkpoint/*", "both checkpoints"),
        (finished, "run/*run.json", "run.json and its copy"),
    ):
        fault = partial(_try, data, base, place, log, pattern, "flip", "compress", seed, expected, results)
        yield Case(f"{base.name} {what}", f"{base.name}: {what}", "compress", fault)


def _shorten_key(name: str) -> str:
    """Shorten the key of a cache entry, which depends on versions."""
    _, kind, key, *rest = name.split("/")
    return f"cache/{kind}/{key[:8]}/{'/'.join(rest)}"


def _generalize(name: str) -> str:
    if name.startswith("cache/"):
        return f"cache, {name.split('/')[1]}"
    return name.removeprefix("run/")


def _kill_in_training(data: Path, place: Path, log: Path, copy: Path) -> Path:
    """Kill a run in the training of its student, with two checkpoints, and copy it."""
    process = start(run_options(data, place, "--quiet"), log, save_each_step)
    curve = place / "run" / "metrics.jsonl"
    while not (curve.exists() and '"student","epoch":2' in curve.read_text().replace(": ", ":")):
        if not process.is_alive():
            raise SystemExit(Path(f"{log}.err").read_text())
        time.sleep(0.001)
    process.kill()
    process.join()
    return Path(shutil.copytree(place, copy))


def _run_undamaged(verb: str, data: Path, base: Path, place: Path, log: Path) -> dict[str, bytes]:
    """Return the files and the output of a command without damage."""
    _set_up(base, place)
    code, errors, printed = run(command(verb, data, place), log)
    if code:
        raise SystemExit(errors)
    return {**_read_outputs(place), "printed": printed}


def _read_outputs(place: Path) -> dict[str, bytes]:
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
    log: Path,
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
    before = {key: content for key, content in read_files(place).items() if key not in names}
    code, errors, printed = run(command(verb, data, place), log)
    verdict, sentence = judge(code, errors, before, place, None)
    if verdict != EQUAL:
        return verdict, sentence
    if verb == "compress":
        return _check_repair(place, base, names, expected)
    if base.name == "killed":
        return verdict, ""  # there is no report to compare with
    outputs = {**_read_outputs(place), "printed": printed}
    differs = [key for key, content in results[verb].items() if outputs.get(key) != content]
    return (DEFECT, f"differ: {', '.join(differs)}") if differs else (EQUAL, "")


def _check_repair(place: Path, base: Path, names: list[str], expected: dict[str, object]) -> tuple[str, str]:
    """Compare the repeated run, including the damaged files, with the uninterrupted one."""
    # Unused entries of the cache were not read.
    unread = [name.split("/")[2] for name in names if name.startswith("cache/")]
    differs = [
        path
        for path in find_differences(read_results(place), expected)
        if not any(key in path for key in unread)
    ]
    for name in names:
        page = name.removeprefix("run/")
        shown = page in PAGES and page != "bench/latency.npz" and base.name == "finished"
        if shown and (place / name).read_bytes() != (base / name).read_bytes():
            differs.append(name)
    return (DEFECT, f"differ: {', '.join(differs[:5])}") if differs else (EQUAL, "")
