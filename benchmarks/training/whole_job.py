"""Time, memory and written bytes of the whole job, then of a second student of the same teacher.

    python -m benchmarks.training.whole_job --out runs/whole --students mobilenetv2,resnet18 \\
        -- --teacher resnet50
    python -m benchmarks.training.whole_job --out runs/whole --students cifar_resnet20,cifar_resnet20 \\
        --teacher-weights none -- --teacher cifar_resnet56 --image-size 32 --epochs 10 --teacher-epochs 10

What follows -- goes to `compress`. Each student is one run of it in --out, all with one shared
cache, empty at the start; from the second on the teacher is the first run's file, and what the first left in
the cache is used again. Seconds are the clock's around the command, and the report's of each stage. Memory is
the peak of the largest process; written are the bytes of files that the command and its child processes
changed, as Linux counts them (0 on tmpfs).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from questpress.pipeline.runs.files import write_json

from benchmarks.cells import markdown

TEACHER = "teacher.safetensors"


def run_job(out: Path, student: str, weights: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the command with the teacher of ``weights``; return its results and costs.

    Raises:
        SystemExit: it failed; its output is above.
    """
    command = [
        sys.executable, "-m", "questpress.pipeline", *arguments, "--student", student,
        "--teacher-weights", weights, "--out", str(out), "--cache", str(out.parent / "cache"),
    ]  # fmt: skip
    print(f"== {out.name}: {student}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{out.name} failed with exit code {process.returncode}")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "student": student,
        "seconds": seconds,
        "costs": {
            "processor time, s": usage.ru_utime + usage.ru_stime,
            "peak memory, MB": usage.ru_maxrss * 1024 / 1e6,
            "written, MB": usage.ru_oublock * 512 / 1e6,
        },
        "stages": {stage["stage"]: stage["seconds"] for stage in report["stages"]},
        "top1": report["student"]["score"]["percent"],
        "environment": report["environment"],
    }


def table(jobs: Sequence[dict[str, Any]]) -> str:
    """Return seconds of each stage and of all, other costs, and each run's fraction of the first's."""
    first, *others = jobs
    stages = list(first["stages"])
    columns = [{**job["stages"], "by the clock": job["seconds"], **job["costs"]} for job in jobs]
    names = [f"{number}: {job['student']}, s" for number, job in enumerate(jobs, 1)]
    fractions = [f"{number} / 1" for number in range(2, len(others) + 2)]
    rows = []
    for stage in [*stages, "by the clock", *first["costs"]]:
        whole = columns[0][stage]
        ratios = [f"{column[stage] / whole:.2f}" if whole else "" for column in columns[1:]]
        rows.append([stage, *(f"{column[stage]:.1f}" for column in columns), *ratios])
    return markdown(["stage", *names, *fractions], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder, new, for the runs and their cache")
    parser.add_argument("--students", required=True, help="timm's names, with commas, in this order")
    parser.add_argument("--teacher-weights", default="auto", help="of the first run, as for compress")
    parser.add_argument("arguments", nargs="*", help="for compress, after --")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty: what lies there would not be done again")
    options.out.mkdir(parents=True, exist_ok=True)
    jobs: list[dict[str, Any]] = []
    for number, student in enumerate(options.students.split(","), 1):
        weights = str(options.out / "1" / TEACHER) if jobs else options.teacher_weights
        jobs.append(run_job(options.out / str(number), student, weights, options.arguments))
    print(table(jobs))
    write_json(options.out / "whole_job.json", {"arguments": options.arguments, "jobs": jobs})


if __name__ == "__main__":
    main()
