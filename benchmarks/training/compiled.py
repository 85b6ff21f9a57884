"""Compilation and CUDA graphs compared with the uncompiled step: throughput, and the loss of the same steps.

    python -m benchmarks.training.compiled --pairs resnet56-resnet20 --subjects "QuEST online" --seconds 10

Options are those of throughput.py; ``--subjects`` are full names. All modes have the same weights, images and
seeds. Their losses are means over the first ``STEPS`` steps, and the row in fp32 shows how much rounding
alone changes them. CUDA graphs require a GPU.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from questpress.pipeline.runs.device import use_threads
from questpress.pipeline.runs.files import write_json

from benchmarks.cells import markdown
from benchmarks.training import throughput
from benchmarks.training.rounds import Comparison, Subject, compare, measure, number, rates

STEPS = 50

EAGER = "uncompiled"

MODES: dict[str, dict[str, Any]] = {
    EAGER: {},
    "uncompiled, fp32": {"precision": "fp32"},
    "compiled": {"compile": "default"},
    "CUDA graphs": {"compile": "reduce-overhead"},
}


def run(pair: str, subject: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a subject of ``throughput.OURS`` in each mode."""
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    with ExitStack() as held:
        setting, source = throughput.build_setting(pair, options, held)
        subjects = []
        for mode, changes in MODES.items():
            if changes.get("compile") == "reduce-overhead" and not options.device.startswith("cuda"):
                continue
            try:
                step = throughput.OURS[subject](replace(setting, **changes))
                meters = [step() for _ in range(STEPS)]
                losses[mode] = meters[-1].means(0)["loss"]
            except Exception as error:  # whatever a compiler raises: the other modes are measured
                failed[mode] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                subjects.append(Subject(mode, setting.batch, step))
        timed = measure(
            subjects,
            seconds=options.seconds,
            rounds=options.rounds,
            threads=options.threads,
            seed=options.seed,
            synchronize=throughput.wait_for_device(options.device),
            log=throughput.log,
        )
    over = [Comparison(mode, "rate", mode, (EAGER,)) for mode in losses if mode != EAGER]
    return {
        "pair": pair,
        "subject": subject,
        "images": source,
        "engine": str(setting.engine),
        "losses": losses,
        "failed": failed,
        "rates": rates(timed, options.seed),
        "ratios": compare(timed, over, options.seed),
    }


def text(result: dict[str, Any]) -> str:
    """Return the table of a subject in Markdown."""
    losses = result["losses"]
    ratios = {
        row["text"]: f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})" for row in result["ratios"]
    }
    rows = [
        [
            row["subject"],
            number(row["images_per_second"]),
            ratios.get(row["subject"], ""),
            f"{losses[row['subject']]:.6f}",
            f"{losses[row['subject']] / losses[EAGER] - 1:+.1e}" if EAGER in losses else "",
        ]
        for row in result["rates"]
    ]
    rows += [[mode, "failed", reason.replace("|", "/"), "", ""] for mode, reason in result["failed"].items()]
    columns = ["mode", "images/s", f"over {EAGER}", f"loss of {STEPS} steps", "difference"]
    return f"### {result['pair']}, {result['subject']}: {result['engine']}\n\n{markdown(columns, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = throughput.parse(arguments)
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data")
    use_threads(options.threads)
    results = [run(pair, subject, options) for pair in options.pairs for subject in options.subjects]
    print("\n".join(map(text, results)))
    if options.out:
        write_json(options.out, json.loads(json.dumps({**throughput.about(options), "compiled": results})))


if __name__ == "__main__":
    main()
