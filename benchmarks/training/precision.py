"""Training and inference rates by precision, layout and compiling: what ``pipeline/runs/device.py`` and
``pipeline/training/engine_search.py`` choose by.

    python -m benchmarks.training.precision --size 64 --networks mobilenetv2_100,resnet18
    python -m benchmarks.training.precision --size 32 --batch 128 --networks cifar_resnet20 --compile
    python -m benchmarks.training.precision --size 64 --batch 128 --networks resnet50 --teacher

Random images and weights, AdamW (fused), one process; images a second in the fastest of the steps that all
settings take in turns, so that a busy moment touches none of them more. ``--compile`` adds compiled rows and
the seconds that compiling took (with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, since compiled code is kept on
disk). ``--teacher``: inference alone, with and without BatchNorm folded.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from questpress.models.build import build
from questpress.models.fold import fold_batch_norm
from questpress.models.readout import Readouts
from questpress.pipeline.runs.device import Engine, bf16_pays, choose_device, choose_engine, use_threads

READS = frozenset({"map", "logits"})
Step = Callable[[], None]


def settings(engine: Engine, compiled: bool) -> Iterator[Engine]:
    """Yield the engines to compare, all on one device."""
    precisions = ("fp32", "bf16") if bf16_pays(engine.device) else ("fp32",)
    for precision in precisions:
        candidate = replace(engine, precision=precision)
        yield from (candidate, replace(candidate, layout="contiguous"))
        if compiled:
            yield replace(candidate, compile="default")


def training(name: str, size: int, batch: int, engine: Engine) -> Step:
    """Return a supervised step that reads what QuEST reads."""
    readouts, images = _laid_out(
        Readouts(build(name, num_classes=10, image_size=size, seed=0)), size, batch, engine
    )
    labels = torch.randint(0, 10, (batch,), device=engine.device)
    optimizer = torch.optim.AdamW(readouts.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        readouts.train()
        with engine.autocast():
            loss = F.cross_entropy(readouts(images, READS)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(name: str, size: int, batch: int, engine: Engine, *, folded: bool = False) -> Step:
    """Return a step that computes a frozen network's readouts."""
    network = build(name, num_classes=10, image_size=size, seed=0).eval()
    if folded:
        network = fold_batch_norm(network, torch.randn(1, 3, size, size))
    readouts, images = _laid_out(Readouts(network), size, batch, engine)

    def step() -> None:
        with torch.no_grad(), engine.autocast():
            readouts(images, READS)

    return step


def _laid_out(readouts: Readouts, size: int, batch: int, engine: Engine) -> tuple[Readouts, torch.Tensor]:
    readouts = readouts.to(engine.device, memory_format=engine.memory_format)  # type: ignore[call-overload]
    readouts.compile_features(engine.compile_mode)
    images = torch.randn(batch, 3, size, size, device=engine.device)
    return readouts, images.contiguous(memory_format=engine.memory_format)


def timed(step: Step, device: str) -> float:
    started = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def race(steps: list[Step], device: str, seconds: float) -> list[tuple[float, float]]:
    """Run steps in turns for ``seconds`` in all; return (fastest, first) in seconds of each."""
    first = [timed(step, device) for step in steps]
    taken: list[list[float]] = [[] for _ in steps]
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken[0]) < 3:
        for step, times in zip(steps, taken, strict=True):
            times.append(timed(step, device))
    return [(min(times), begun) for times, begun in zip(taken, first, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="mobilenetv2_100,resnet50,resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="compiled rows too")
    parser.add_argument("--teacher", action="store_true", help="inference, with BatchNorm folded and not")
    parser.add_argument("--seconds", type=float, default=15, help="of measuring, for each network and kind")
    options = parser.parse_args()
    device = choose_device(options.device)
    table = teachers if options.teacher else students
    heads = ("BatchNorm", "inference, images/s") if options.teacher else (
        "compiled", "training, images/s", "compiling, s", "inference, images/s", "the rule's")  # fmt: skip
    print("| network | precision | layout |", *(f"{head} |" for head in heads))
    print("|" + "---|" * (3 + len(heads)))
    for name in options.networks.split(","):
        rule = choose_engine(device, "auto", build(name, num_classes=10, image_size=options.size))
        use_threads(rule.threads)
        table(name, options, rule)


def students(name: str, options: argparse.Namespace, rule: Engine) -> None:
    engines = list(settings(rule, options.compile))
    sizes = options.size, options.batch
    trains = race([training(name, *sizes, engine) for engine in engines], rule.device, options.seconds)
    infers = race([inference(name, *sizes, engine) for engine in engines], rule.device, options.seconds)
    for engine, (trained, first), (inferred, _) in zip(engines, trains, infers, strict=True):
        compiled = engine.compile != "off"
        print(
            f"| {name} | {engine.precision} | {engine.layout.replace('_', ' ')} "
            f"| {'yes' if compiled else ''} "
            f"| {options.batch / trained:.0f} | {f'{first - trained:.0f}' if compiled else ''} "
            f"| {options.batch / inferred:.0f} | {'yes' if engine == rule else ''} |",
            flush=True,
        )


def teachers(name: str, options: argparse.Namespace, rule: Engine) -> None:
    kinds = [
        (engine, folded) for engine in settings(rule, options.compile) if engine.layout != "contiguous"
        for folded in (False, True)
    ]  # fmt: skip
    sizes = options.size, options.batch
    steps = [inference(name, *sizes, engine, folded=folded) for engine, folded in kinds]
    for (engine, folded), (taken, _) in zip(kinds, race(steps, rule.device, options.seconds), strict=True):
        print(
            f"| {name} | {engine.precision} | {engine.layout.replace('_', ' ')}"
            f"{', compiled' if engine.compile != 'off' else ''} | {'folded' if folded else 'as it is'} "
            f"| {options.batch / taken:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
