"""Throughput of distillation: images a second of our steps and of other packages' on the same pairs.

    python -m benchmarks.training.throughput --pairs resnet56-resnet20 --seconds 20 --out throughput.json
    python -m benchmarks.training.throughput --device cuda

Without --data the images are made up here. All subjects share one process, its threads and its images; their
rounds are interleaved in random order (rounds.py). torchdistill's and timm's KD stand in three rows each
(peers.py), so that the ratio of ours to theirs comes apart into the store, QuEST instead of KD, our step,
precision with layout, and the reading of images. A package that is not installed is left out with a sentence:
`pip install torchdistill`.
"""

import argparse
import importlib.metadata
import json
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from questpress.export.latency.machine import environment
from questpress.export.runtime import allowed_cores
from questpress.pipeline.data.dataset import ImageSet
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.methods.quest.quest import LIKELY_TOP
from questpress.pipeline.methods.quest.vocabulary import choose_words
from questpress.pipeline.runs.device import choose_device, device_name, use_threads
from questpress.pipeline.runs.files import write_json

from benchmarks.training import ours, peers
from benchmarks.training.ours import Setting
from benchmarks.training.pictures import made_up
from benchmarks.training.rounds import (
    Comparison,
    Subject,
    compare,
    do_nothing,
    measure,
    rates,
    rates_table,
    ratios_table,
)


@dataclass(frozen=True)
class Pair:
    teacher: str
    student: str
    size: int

    @property
    def batch(self) -> int:
        return 128 if self.size <= 64 else 32

    @property
    def images(self) -> int:
        return 10_000 if self.size <= 64 else 1000


PAIRS = {
    "resnet50-mobilenetv2": Pair("resnet50", "mobilenetv2_100", 224),
    "resnet56-resnet20": Pair("cifar_resnet56", "cifar_resnet20", 32),
    "wrn40_2-wrn16_2": Pair("cifar_wrn_40_2", "cifar_wrn_16_2", 32),
}

SAMPLED = ", sampled positions"

OURS: dict[str, Callable[[Setting], Callable[[], Any]]] = {
    "supervised": lambda setting: ours.step(setting, None),
    "teacher alone": ours.teacher_alone,
    "QuEST stored": lambda setting: ours.step(setting, "quest", stored=True),
    f"QuEST stored{SAMPLED}": lambda setting: ours.step(
        setting, "quest", stored=True, positions=setting.positions
    ),
    "QuEST online": lambda setting: ours.step(setting, "quest"),
    f"QuEST online{SAMPLED}": lambda setting: ours.step(setting, "quest", positions=setting.positions),
    "KD stored": lambda setting: ours.step(setting, "kd", stored=True),
    "KD online": lambda setting: ours.step(setting, "kd"),
}

PEERS = {"torchdistill": peers.torchdistill, "timm": peers.timm}
VARIANTS = {"as its users get it": None, "our data": False, "our data, precision and layout": True}
"""Each package's rows, and what ``peers.py`` makes of them; in this order in ``comparisons``."""


STORED = [f"{method} stored{places}" for method, places in (("QuEST", ""), ("QuEST", SAMPLED), ("KD", ""))]
ONLINE = [name.replace("stored", "online") for name in STORED]

GOALS = {"torchdistill": {"stored": 3.0, "online": 1.6}}
"""The least rates that QuEST is to reach, against the package as its users get it."""


def comparisons(names: Collection[str]) -> Iterator[Comparison]:
    """Yield the ratios to compute: ours, then those to each package and what makes them up."""
    for name in STORED:
        yield Comparison(f"{name}, over supervised", "time", name, ("supervised",), 1.15)
    for name in ONLINE:
        both = ("supervised", "teacher alone")
        yield Comparison(f"{name}, over supervised + teacher", "time", name, both, 1.20)
    yield Comparison("QuEST stored over online", "rate", "QuEST stored", ("QuEST online",))
    yield Comparison("sampled over all positions, stored", "rate", STORED[1], (STORED[0],))
    yield Comparison("QuEST over KD, stored", "rate", "QuEST stored", ("KD stored",))
    yield Comparison("QuEST over KD, online", "rate", "QuEST online", ("KD online",))
    for package in PEERS:
        got, data, equal = (f"{package} KD, {how}" for how in VARIANTS)
        if got not in names:
            continue
        for name in (*STORED, *ONLINE):
            goal = GOALS.get(package, {}).get("stored" if "stored" in name else "online")
            goal = None if name.startswith("KD") else goal
            yield Comparison(f"{name}, over {package}", "rate", name, (got,), goal)
        yield Comparison(f"… our step: KD online over {package}, all equal", "rate", "KD online", (equal,))
        yield Comparison(f"… precision and layout, in {package}", "rate", equal, (data,))
        yield Comparison(f"… the reading of images, in {package}", "rate", data, (got,))


def subjects(setting: Setting, wanted: Sequence[str], held: ExitStack) -> Iterator[Subject]:
    """Yield those whose names contain one of ``wanted``; ``held`` closes what they hold."""
    for name, make in OURS.items():
        if _is_wanted(name, wanted):
            yield Subject(name, setting.batch, make(setting))
    for package, of_package in PEERS.items():
        for how, like_ours in VARIANTS.items():
            name = f"{package} KD, {how}"
            if not _is_wanted(name, wanted):
                continue
            try:
                step, feed = of_package(setting, like_ours, held)
            except ImportError as error:
                log(f"{package} is left out: {error}; pip install {package}.")
                break
            begin, end = (feed.begin, feed.end) if feed else (do_nothing, do_nothing)
            yield Subject(name, setting.batch, step, begin, end)


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(part in name for part in wanted)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a pair; return the results."""
    with ExitStack() as held:
        setting, source = build_setting(name, options, held)
        chosen = list(subjects(setting, options.subjects, held))
        timed = measure(
            chosen,
            seconds=options.seconds,
            rounds=options.rounds,
            threads=options.threads,
            seed=options.seed,
            synchronize=wait_for_device(options.device),
            log=log,
        )
    return {
        "pair": name,
        **asdict(PAIRS[name]),
        "batch": setting.batch,
        "words": setting.words,
        "images": source,
        "engines": {"student": str(setting.engine), "teacher": str(setting.teacher_engine)},
        "workers": {
            "torchdistill": min(options.workers, peers.TORCHDISTILL_WORKERS),
            "timm": min(options.workers, peers.TIMM_WORKERS),
        },
        "rates": rates(timed, options.seed),
        "ratios": compare(timed, comparisons({samples.subject for samples in timed}), options.seed),
    }


def build_setting(name: str, options: argparse.Namespace, held: ExitStack) -> tuple[Setting, str]:
    """Return the setting of a pair and the source of its images; ``held`` removes its files."""
    pair = PAIRS[name]
    images = _images(pair, options)
    setting = Setting(
        teacher=pair.teacher,
        student=pair.student,
        size=pair.size,
        batch=options.batch or pair.batch,
        images=images.train,
        classes=len(images.classes),
        words=options.words or choose_words(len(images.train)),
        top=options.top,
        positions=options.positions,
        device=options.device,
        threads=options.threads,
        precision=options.precision,
        compile=options.compile,
        workers=options.workers,
        scratch=Path(held.enter_context(TemporaryDirectory(prefix="questpress-throughput-"))),
        weights=options.teacher_weights,
        race=options.race,
    )
    return setting, images.source


def wait_for_device(device: str) -> Callable[[], None]:
    """Return a function that waits until the device has nothing left to do."""
    return torch.cuda.synchronize if device.startswith("cuda") else do_nothing


def _images(pair: Pair, options: argparse.Namespace) -> ImageSet:
    count = options.images or pair.images
    if options.data:
        given = open_data(options.data, val_fraction=0)
        some = given.train[:: -(-len(given.train) // count)]
        return replace(given, source=f"{len(some)} images of {given.name}", train=some)
    return made_up(count, options.classes, pair.size if pair.size <= 64 else None, options.seed)


PATHS = ("out", "data", "teacher_weights")
"""Options that are paths on this machine."""


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the versions and the options."""
    packages = ("torch", "torchvision", "timm", "torchdistill", "pillow", "numpy")
    return {
        "environment": asdict(environment()),
        "device": f"{options.device} ({device_name(options.device)})",
        "versions": {name: _version(name) for name in packages},
        "options": {key: value for key, value in vars(options).items() if key not in PATHS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(pair: dict[str, Any]) -> str:
    """Return the tables of a pair, in Markdown."""
    engines = pair["engines"]
    return "\n".join(
        [
            f"### {pair['teacher']} → {pair['student']}, {pair['size']} pixels, batch {pair['batch']}\n",
            f"{pair['images']}; {pair['words']} words; student: {engines['student']}; "
            f"teacher: {engines['teacher']}.\n",
            rates_table(pair["rates"]),
            ratios_table(pair["ratios"]),
        ]
    )


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default=",".join(PAIRS), help="names, with commas [default: all]")
    parser.add_argument("--subjects", default="", help="parts of names, with semicolons [default: all]")
    parser.add_argument("--seconds", type=float, default=60, help="timed, for each subject")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, help="default: 128 at 32 pixels, else 32")
    parser.add_argument(
        "--words",
        type=int,
        help="QuEST's vocabulary [default: as a run chooses it for this number of images]",
    )
    parser.add_argument("--top", type=int, default=LIKELY_TOP, help="words that a stored target keeps")
    parser.add_argument("--positions", type=int, default=16, help="of each image, where they are sampled")
    parser.add_argument("--teacher-weights", type=Path, help="a file [default: random ones]")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=allowed_cores())
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of our engine")
    parser.add_argument(
        "--compile", choices=("off", "default", "reduce-overhead"), default="off", help="of our networks"
    )
    parser.add_argument(
        "--race", action="store_true", help="the student by the fastest engine, as long trainings choose it"
    )
    parser.add_argument(
        "--workers", type=int, default=allowed_cores(), help="of each DataLoader, at most the packages' own"
    )
    parser.add_argument("--data", help="a folder or a name, as for compress [default: made up here]")
    parser.add_argument("--images", type=int, help="how many [default: 10,000 at 32 pixels, else 1,000]")
    parser.add_argument("--classes", type=int, default=100, help="of the made-up images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for all that was measured")
    options = parser.parse_args(arguments)
    options.pairs = options.pairs.split(",")
    options.subjects = [part for part in options.subjects.split(";") if part]
    options.device = choose_device(options.device)
    unknown = sorted(set(options.pairs) - set(PAIRS))
    if unknown:
        parser.error(f"no pair {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # Held worker processes must be let go, whatever ends this program.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The peers' loaders warn of more workers than cores, and of tensors that no process shares.
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data")
    torch.backends.cudnn.benchmark = True  # as torchdistill's and timm's scripts have it
    use_threads(options.threads)
    facts = about(options)
    machine = facts["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {facts['device']}, {options.threads} threads; "
        f"load {machine['load']} at the start; {versions}; {options.seconds:g} s a subject in "
        f"{options.rounds} rounds; {options.top} words stored a position, "
        f"{options.positions} positions where sampled\n"
    )
    pairs = []
    for name in options.pairs:
        pairs.append(run(name, options))
        print(text(pairs[-1]), flush=True)
        if options.out:
            write_json(options.out, json.loads(json.dumps({**facts, "pairs": pairs})))


if __name__ == "__main__":
    main()
