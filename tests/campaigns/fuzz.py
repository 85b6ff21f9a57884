"""Hostile and damaged input against everything that reads what others have written.

    pip install atheris
    python -m tests.campaigns.fuzz manifest --seconds 60
    python -m tests.campaigns.fuzz all --seconds 60

Each target takes bytes and may do one of two things: read them, or raise the error that the command turns
into a sentence. Anything else is a crash: it is printed, kept under --out, and makes the exit code 1. Inputs
are made by atheris (libFuzzer), guided by which lines of ours they reach, from real files as seeds; each
target runs in a process of its own with a limit on memory and on the time of one input. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.campaigns.fuzz_targets import TARGETS

MEMORY_MB, SLOWEST_SECONDS = 2048, 10
OURS = ["questpress"]


def fuzz(name: str, seconds: int, corpus: Path, crashes: Path) -> None:
    """In this process: feed the target until the time is over or it crashes."""
    import atheris

    target = TARGETS[name]
    with atheris.instrument_imports(include=OURS), tempfile.TemporaryDirectory() as work:
        read = target.make(Path(work))
        atheris.Setup(
            [
                sys.argv[0], f"-max_total_time={seconds}", f"-timeout={SLOWEST_SECONDS}",
                f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={crashes}/", "-print_final_stats=1",
                "-verbosity=0", "-max_len=65536", str(corpus),
            ],
            read,
        )  # fmt: skip
        atheris.Fuzz()


def campaign(name: str, seconds: int, out: Path) -> bool:
    """One target in a process of its own; whether nothing crashed."""
    corpus, crashes = out / name / "corpus", out / name / "crashes"
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in TARGETS[name].seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.campaigns.fuzz", name, "--seconds", str(seconds), "--out", str(out),
            "--inside",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = done.stdout + done.stderr
    counted = re.search(r"number_of_executed_units:\s*(\d+)", told)
    runs = int(counted[1]) if counted else 0
    left = sorted(crashes.iterdir())
    verdict = "no crash" if not left and not done.returncode else f"CRASHED, see {crashes}"
    print(f"| {name} | {runs:,} | {seconds} s | {verdict} |", flush=True)
    if verdict != "no crash":
        print("\n".join(told.strip().splitlines()[-25:]))
    return verdict == "no crash"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("fuzzing"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        folder = asked.out / asked.target
        fuzz(asked.target, asked.seconds, folder / "corpus", folder / "crashes")
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("tests.campaigns.fuzz needs atheris: pip install atheris")
    print("| target | inputs | time | |\n|---|---|---|---|")
    names = list(TARGETS) if asked.target == "all" else [asked.target]
    fine = [campaign(name, asked.seconds, asked.out) for name in names]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
