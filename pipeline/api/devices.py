"""`compress bench RUN --device`, `--add`: results of `predict.py --bench` on other devices."""

import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ...export.results import DeviceBench
from ...export.runtime.processor import bench_file_name
from ..errors import JobError, UsageError
from ..runs.artifacts import open_files
from ..runs.console import Display
from ..runs.files import write_text
from ..runs.folder import RunFolder
from ..runs.record import MAX_BYTES, parse_json
from ..runs.results import Report

_DEVICE = re.compile(r"ssh:(//)?(?!-)[\w.@:%\[\]-]+", re.ASCII)
_SETUP = "python3 -m venv venv && venv/bin/pip install -q numpy pillow onnxruntime"
_SCRIPT = """
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder"
tar -xf -
{
{setup}
{python} artifact/predict.py --bench --out results{options}
} >&2
cat results/bench.*.json
"""
"""Script for the device: artifact as tar on stdin, result as JSON on stdout. The folder is deleted."""


def bench_devices(
    run: str | Path,
    devices: Sequence[str],
    *,
    setup: bool = False,
    seconds: float | None = None,
    quiet: bool = False,
) -> Report:
    """Run ``predict.py --bench`` of a run's artifact on devices over ssh, and write its report again.

    Args:
        run: a run folder with an artifact.
        devices: ``ssh:`` and a destination of the ssh command, such as ``ssh:pi@raspberrypi.local``.
        setup: install numpy, Pillow and onnxruntime in a temporary virtual environment of the device.
        seconds: time for each file and number of threads.
        quiet: show no progress on standard error.

    Raises:
        UsageError: it is not a run folder, or a device has another form; nothing was started.
        JobError: a device cannot be reached, the bench fails there, or the results cannot be written.
    """
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise UsageError(f"--device must have the form ssh:USER@HOST, got {device!r}.")
    folder = RunFolder.read(Path(run))
    artifact = open_files(folder.path)[0].path.parent
    display = Display(quiet=quiet)
    for device in dict.fromkeys(devices):
        with tempfile.TemporaryFile() as content, display.stage("bench") as progress:
            progress.update(device, 0.0, 1.0)
            _pack(artifact, content)
            result = _bench_over_ssh(device, content, setup=setup, seconds=seconds)
        report = _add(folder, {f"--device {device}": result})
    return report


def add_devices(run: str | Path, files: Sequence[str | Path]) -> Report:
    """Copy results of ``predict.py --bench`` into a run folder and write its report again.

    Results of the same device are replaced.

    Args:
        run: a run folder with an artifact.
        files: files ``bench.DEVICE.json``.

    Raises:
        UsageError: it is not a run folder, or a file is not the result of one of its model files.
        JobError: the results cannot be written, or another process uses the run folder.
    """
    folder, results = RunFolder.read(Path(run)), {}
    for file in map(Path, files):
        try:
            with file.open("rb") as stream:
                results[f"--add {file}"] = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise UsageError(f"--add {file}: {error.strerror}.") from error
    return _add(folder, results)


def _add(folder: RunFolder, results: Mapping[str, bytes]) -> Report:
    """Write the JSON of each source into the run folder. Raises UsageError if it is of another run."""
    from ..report.run_report import write

    manifest = open_files(folder.path)[0].manifest
    assert manifest is not None  # it is a folder
    hashes = {entry["sha256"] for entry in manifest["files"]}
    benches = []
    for source, content in results.items():
        try:
            if len(content) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
            bench = DeviceBench.model_validate(parse_json(content.decode("utf-8")))
        except ValueError as error:
            raise UsageError(
                f"{source} is not a result of this version of predict.py --bench. Repeat the bench with "
                f"the artifact of {folder.path}."
            ) from error
        if not hashes.intersection(result.sha256 for result in bench.results):
            raise UsageError(
                f"{source} timed other model files than those of {folder.path}. Copy its artifact to the "
                "device and repeat the bench."
            )
        benches.append(bench)
    folder.writes = True
    with folder.locked():
        for bench in benches:
            name = bench_file_name(bench.device.processor)
            write_text(folder.path / "bench" / name, bench.model_dump_json(indent=2) + "\n")
        return write(folder)


def _pack(artifact: Path, file: IO[bytes]) -> None:
    """Write an artifact folder as a tar archive without the names of users, and rewind it."""

    def anonymize(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if entry.name.endswith("__pycache__") else entry

    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(artifact, "artifact", filter=anonymize)
    file.seek(0)


def _bench_over_ssh(device: str, content: IO[bytes], *, setup: bool, seconds: float | None) -> bytes:
    """Return the JSON that the bench of a packed artifact writes on a device. Raises JobError."""
    script = (
        _SCRIPT.replace("{setup}", _SETUP if setup else "true")
        .replace("{python}", "venv/bin/python" if setup else "python3")
        .replace("{options}", "" if seconds is None else f" --seconds {seconds:g}")
    )
    target = device if device.startswith("ssh://") else device.removeprefix("ssh:")
    try:
        done = subprocess.run(
            ["ssh", target, f"sh -c {shlex.quote(script)}"], stdin=content, capture_output=True, check=False
        )
    except OSError as error:
        raise JobError(f"--device {device}: the program ssh cannot be started: {error.strerror}.") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        hint = "" if setup else " Packages can be installed there with --setup."
        more = hint if "not installed" in lines[-1] else ""
        raise JobError(f"--device {device} failed: {lines[-1].removeprefix('Error: ').rstrip('.')}.{more}")
    return done.stdout
