"""`predict.py --bench` compared with `compress bench`, on one thread of this machine.

    python -m benchmarks.latency.device runs/a runs/b runs/c --times 8

The two measure each run's artifact in turns. Printed are the ratio of their medians (p50) of each file, and
that of the quotients of two files, which do not depend on a clock that changes between turns: the geometric
mean of the turns with a 95 % interval (Student's t).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.cells import markdown


def measure_on_device(artifact: Path, folder: Path, seconds: str) -> dict[str, float]:
    """Return the medians of `predict.py --bench` by file."""
    _run(artifact / "predict.py", "--bench", "--threads", "1", "--seconds", seconds, "--out", folder)
    [file] = folder.glob("bench.*.json")
    return {row["name"]: row["latency_ms"]["p50"]["value"] for row in _read(file)["results"]}


def measure_here(artifact: Path, names: list[str], folder: Path, seconds: str) -> dict[str, float]:
    """Return the medians of `compress bench` by file."""
    files = [artifact / name for name in names]
    command = ("-m", "questpress.pipeline", "bench", *files, "--threads", "1", "--seconds", seconds)
    _run(*command, "--out", folder, "--quiet")
    bench = _read(folder / "bench.json")
    file_of = {subject["name"]: Path(subject["file"]).name for subject in bench["subjects"]}
    rows = [(file_of[row["subject"]], row) for row in bench["latencies"]]
    return {name: row["percentiles"]["p50"]["value"] for name, row in rows if "p50" in row["percentiles"]}


def _run(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def compare(ratios: np.ndarray) -> str:
    """Return the geometric mean of ratios with its interval."""
    logs = np.log(ratios)
    margin = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    low, ratio, high = np.exp([logs.mean() - margin, logs.mean(), logs.mean() + margin])
    return f"{ratio:.3f} ({low:.3f}–{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--times", type=int, default=8, help="turns [default: 8]")
    parser.add_argument("--seconds", default="2", help="of each file and turn [default: 2]")
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        artifact, turns = run / "artifact", []
        for _ in range(options.times):
            with tempfile.TemporaryDirectory() as folder:
                device = measure_on_device(artifact, Path(folder), options.seconds)
                here = measure_here(artifact, list(device), Path(folder), options.seconds)
            if device.keys() == here.keys():  # compress bench reports no disturbed median
                turns.append([[device[name], here[name]] for name in device])
        if len(turns) < 2:
            raise SystemExit(
                f"{run}: {len(turns)} of {options.times} turns were undisturbed. Use a free machine."
            )
        times = np.array(turns)  # [turns, files, 2]
        ratios = times[..., 0] / times[..., 1]
        for index, name in enumerate(device):
            rows.append([run.name, name, f"{np.median(times[:, index, 1]):.3g}", compare(ratios[:, index])])
        if len(device) == 2:
            rows.append([run.name, " / ".join(device), "", compare(ratios[:, 0] / ratios[:, 1])])
    print(markdown(["run", "file", "p50, ms", "predict.py / compress bench"], rows))


if __name__ == "__main__":
    main()
