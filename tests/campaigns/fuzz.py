"""Fuzz every reader of untrusted input.

    pip install atheris
    python -m tests.campaigns.fuzz manifest --seconds 60
    python -m tests.campaigns.fuzz all --seconds 60

A target reads its input or raises the error that the command reports. Anything else is a crash: it is
printed, kept under --out, and makes the exit code 1. atheris (libFuzzer) generates inputs from real files,
guided by coverage of our lines; each target runs in a separate process with limits on memory and on the time
per input. Linux only.
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
    """Feed the target in this process until the time is over or it crashes."""
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
    """Fuzz one target in a separate process; return True if nothing crashed."""
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
    output = done.stdout + done.stderr
    count = re.search(r"number_of_executed_units:\s*(\d+)", output)
    runs = int(count[1]) if count else 0
    left = sorted(crashes.iterdir())
    verdict = "no crash" if not left and not done.returncode else f"CRASHED, see {crashes}"
    print(f"| {name} | {runs:,} | {seconds} s | {verdict} |", flush=True)
    if verdict != "no crash":
        print("\n".join(output.strip().splitlines()[-25:]))
    return verdict == "no crash"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("fuzzing"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        folder = options.out / options.target
        fuzz(options.target, options.seconds, folder / "corpus", folder / "crashes")
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("tests.campaigns.fuzz needs atheris: pip install atheris")
    print("| target | inputs | time | |\n|---|---|---|---|")
    names = list(TARGETS) if options.target == "all" else [options.target]
    passed = [campaign(name, options.seconds, options.out) for name in names]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
