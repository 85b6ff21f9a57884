"""``compress store verify``: some of the answers a run has learned from are computed again and compared."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.text import Text
from torch import Tensor

from ..errors import JobError, UsageError
from ..methods.base import CachedOutput
from ..runs.cache import Cache
from ..runs.console import Display, Stage, safe_console
from ..runs.device import Engine, choose_device, use_threads
from ..runs.files import sha256
from ..runs.folder import RunFolder, read_config
from ..training.job import Job
from ..training.student import TEACHERS, methods_of
from ..training.teacher_cache import KIND, Ask, Store, mapped, schedule_of, store_of
from .options import read_options
from .resolve import resolve

ROUNDING = {"fp32": 0.01, "bf16": 0.05}
"""Length of the difference of two answers over the answer's own length that rounding explains. Another engine
adds in another order, or multiplies with 10 bits of mantissa (TF32; fp16, which is stored, has no more) or
with 7 (bf16); the error of one product, 2⁻¹¹ or 2⁻⁸, grows with the root of the number of layers."""

WORDS_ROUNDING = {"fp32": 0.02, "bf16": 0.1}
"""The same for words: the share of p_T that lies on other words, on average over an image's positions. It is
larger, since τ divides a feature's error before the softmax; words of tiny probability may even swap."""


@dataclass
class Compared:
    """One part of a teacher's answers, computed again for some of the images of several views."""

    teacher: str
    readout: str
    tolerance: float
    answers: int = 0
    equal: int = 0
    """Those whose every bit is the same."""
    largest: float = 0.0

    def __str__(self) -> str:
        told = f"{self.teacher}, {self.readout}: {self.answers:,} answers computed again, "
        if self.equal == self.answers:
            return told + "all equal to the bit"
        return told + (
            f"{self.equal:,} equal to the bit, the largest difference {100 * self.largest:.2g} % "
            f"(rounding explains {100 * self.tolerance:g} %)"
        )


def verify(run: Path, cache: Path | None, share: float) -> None:
    """Compute a share of a run's stored answers again, compare them, and say what was found.

    Args:
        run: a run folder whose student has learned from a store.
        share: of each view's batches, 0 to 1; one batch of each view in any case.

    Raises:
        UsageError: there is no such run, or it has used no store.
        JobError: an answer is wrong or damaged, or none is there any more.
    """
    display = Display(quiet=False)
    with display.stage("verify") as progress:
        job = _job(run, cache, display, progress)
        views = schedule_of(job).used(job.options.epochs or 0)
        engine = replace(Engine.of(job.folder.record.engines[TEACHERS].model_dump()), device=job.device)
        use_threads(engine.threads)
        store = store_of(job, methods_of(job), engine)
        compared, missing = _verified(store, views, share, engine.precision)
    if not compared:
        raise JobError(
            f"None of the answers that {run} has learned from is in {job.cache.root} any more; --cache names "
            "another folder."
        )
    console = safe_console(highlight=False)
    for one in compared:
        console.print(Text(str(one)), soft_wrap=True)
    wanted = len(views) * sum(len(source.answers) for source in store.sources)
    gone = f"; {missing:,} are no longer stored" if missing else ""
    told = f"{wanted - missing:,} of {wanted:,} entries have the checksums they were written with{gone}."
    console.print(Text(told), soft_wrap=True)


def _job(run: Path, cache: Path | None, display: Display, progress: Stage) -> Job:
    """The run as its folder tells it; nothing is written there."""
    if not (run / "run.json").is_file() or not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is not a run folder; name one that compress has made, such as runs/shop.")
    folder = RunFolder(run, writes=False)
    folder.open(fresh=False)
    read_config(run)  # as the run has left it
    options = read_options({"config": str(run / "config.yaml"), "out": run, "cache": cache})
    if not options.cache_views:
        raise UsageError(f"{run} has asked its teachers at every step: it has stored nothing.")
    if TEACHERS not in folder.record.engines:
        raise UsageError(f"{run} has not come to the student yet: it has stored nothing.")
    chosen, images = resolve(options)
    if images.fingerprint != folder.record.config["data_content"]:
        raise JobError(f"--data {chosen.data} no longer holds the images that {run} was made with.")
    job = Job(chosen, frozenset(), images, folder, Cache(cache), display, choose_device(None), progress)
    stages = folder.record.stages
    left = {name: sum for stage in stages.values() for name, sum in stage["outputs"].items()}
    for name in [*(teacher.file for teacher in job.current_teachers), job.prepared]:
        if name in left and (not (run / name).is_file() or sha256(run / name) != left[name]):
            raise JobError(f"{run / name} is not as the run has left it: nothing can be compared with it.")
    return job


def _verified(store: Store, views: range, share: float, precision: str) -> tuple[list[Compared], int]:
    """What was compared, and how many entries there are not."""
    found: list[Compared] = []
    missing = 0
    for t, source in enumerate(store.sources):
        ask: Ask | None = None
        of_words = [any(name.endswith(".ids") for name in answer.arrays) for answer in source.answers]
        compared = [
            Compared(
                source.name, str(answer.key["readout"]), (WORDS_ROUNDING if words else ROUNDING)[precision]
            )
            for answer, words in zip(source.answers, of_words, strict=True)
        ]
        for view in views:
            places = _undamaged(store, t, view)
            missing += places.count(None)
            if any(places):
                ask = ask or source.load()
                _compare(store, t, view, places, ask, share, compared)
        found += [one for one in compared if one.answers]
    return found, missing


def _undamaged(store: Store, t: int, view: int) -> list[Path | None]:
    """
    Raises:
        JobError: a checksum does not hold.
    """
    answers = store.sources[t].answers
    there = [(store.cache.root / KIND / store.key(t, answer, view)).is_dir() for answer in answers]
    places = store.find(t, view)
    for answer, was, place in zip(answers, there, places, strict=True):
        if was and place is None:
            raise JobError(
                f"What {store.sources[t].name} answers to view {view} ({answer.key['readout']}) was damaged "
                "on the disk. It has been removed, and the next run that wants it computes it anew."
            )
    return places


def _compare(
    store: Store,
    t: int,
    view: int,
    places: list[Path | None],
    ask: Ask,
    share: float,
    compared: list[Compared],
) -> None:
    """
    Raises:
        JobError: an answer differs by more than rounding explains.
    """
    source = store.sources[t]
    stored = {a: mapped(place, source.answers[a]) for a, place in enumerate(places) if place is not None}
    reads = frozenset[str]().union(*(source.answers[a].reads for a in stored))
    count = max(1, math.ceil(share * len(store.starts)))
    # Others in each view, and the same ones each time.
    starts = sorted(random.Random(view).sample(store.starts, count))
    for start, pixels in zip(starts, store.render(map(store.batch_at, starts), view), strict=True):
        readout = ask(pixels, reads)
        store.show(f"asking {source.name} about view {view}", start, store.images)
        for a, arrays in stored.items():
            answer, one = source.answers[a], compared[a]
            anew = {name: _kept(answer, name, values) for name, values in answer.compact(readout).items()}
            before = {name: array[start : start + len(pixels)] for name, array in arrays.items()}
            same = [
                all(np.array_equal(anew[name][row], before[name][row]) for name in before)
                for row in range(len(pixels))
            ]
            differences = difference(before, anew)
            one.answers += len(pixels)
            one.equal += sum(same)
            one.largest = max(one.largest, float(differences.max()))
            if not one.largest <= one.tolerance:
                raise JobError(
                    f"What is stored of {source.name}'s answer to view {view} of image "
                    f"{start + int(differences.argmax())} ({one.readout}) differs by "
                    f"{100 * one.largest:.2g} % from the answer itself, and rounding explains "
                    f"{100 * one.tolerance:g} %; remove {places[a]}, and the next run that wants it computes "
                    "it anew."
                )


def _kept(answer: CachedOutput, name: str, values: Tensor) -> np.ndarray:
    """As the store would keep it."""
    array: np.ndarray = values.cpu().numpy().astype(answer.arrays[name][1])
    return array


def difference(before: Mapping[str, np.ndarray], anew: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far two answers to the same images are apart, float64 [B]: for words the share of p_T on other
    words (total variation), on average over positions; else the length of the difference over the first's.
    """
    ids = next((name for name in before if name.endswith(".ids")), None)
    if ids is None:
        [name] = before
        a, b = (arrays[name].astype(np.float64).reshape(len(arrays[name]), -1) for arrays in (before, anew))
        return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)
    p = ids.removesuffix(".ids") + ".p"
    known = int(max(before[ids].max(), anew[ids].max())) + 1
    apart = np.empty(len(before[ids]))
    for row in range(len(apart)):  # an image at a time: positions × words is large
        dense = np.zeros((2, before[ids].shape[1], known))
        for side, arrays in enumerate((before, anew)):
            of_image = arrays[p][row].astype(np.float64)
            share = of_image / of_image.sum(1, keepdims=True)
            np.put_along_axis(dense[side], arrays[ids][row].astype(np.int64), share, 1)
        apart[row] = 0.5 * np.abs(dense[0] - dense[1]).sum(1).mean()
    return apart
