"""Which images a validation is about, and what is asked of them: their labels by the names that a network
knows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from .. import train_images
from ..api.validate_inputs import Asked
from ..config_file import read_config
from ..data.dataset import ROLES, Image, Progress, Role, Skipped, in_order, printable
from ..data.given import Given
from ..data.sources import open_data, read_data
from ..data.splits import listed
from ..errors import UsageError
from ..report.format import counted
from ..runs.files import digest
from ..runs.folder import RunFolder

Part = Literal["train", "select", "test", "all"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Chosen:
    """Labelled images. ``classes`` are the names that ``images``' labels are numbers of."""

    name: str
    source: str
    part: Part
    classes: tuple[str, ...]
    images: tuple[Image, ...]
    multi_label: bool
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def shown(self) -> list[str]:
        """The classes that an image shows, in their order."""
        seen = {label for image in self.images for label in image.labels}
        return [name for label, name in enumerate(self.classes) if label in seen]

    def digest(self, images: Sequence[Image]) -> str:
        """Of some of the images: of their content and of what they show."""
        return digest(
            sorted([image.key, *(self.classes[label] for label in image.labels)] for image in images)
        )

    def targets(self, images: Sequence[Image], labels: Sequence[str], *, several: bool) -> np.ndarray:
        """What a network that knows ``labels`` should answer: numbers int64 [n], or where images have
        ``several`` labels float32 [n,labels] of zeros and ones.
        """
        place = {name: number for number, name in enumerate(labels)}
        numbers = [place.get(name, -1) for name in self.classes]
        if not several:
            return np.array([numbers[image.label] for image in images], dtype=np.int64)
        found = np.zeros((len(images), len(labels)), dtype=np.float32)
        for row, image in enumerate(images):
            found[row, [numbers[label] for label in image.labels if numbers[label] >= 0]] = 1
        return found


def choose(
    data: str,
    part: Part | None,
    runs: Collection[Path],
    data_dir: Path | None,
    download: bool,
    progress: Progress,
) -> Chosen:
    """The images of ``data``: of the role that is asked for; else those given for testing; where none has a
    role, all of them.

    Raises:
        UsageError: the data are not there or have no image of that role.
    """
    given = read_data(data, data_dir=data_dir, download=download, to_learn=False, progress=progress)
    if part is None:
        part = "test" if given.has_roles else "all"
    if part != "all" and not given.images.get(part):
        raise UsageError(_without_role(given, part))
    roles: Sequence[Role] = ROLES if part == "all" else (part,)
    images = [image for role in roles for image in given.images.get(role, ())]
    if not images:
        raise UsageError(f"{given.source} holds no image that can be read.")
    warnings = [*_copies(images), *_learned(given, images, part, runs)]
    return Chosen(
        given.name,
        given.source,
        part,
        given.classes,
        in_order(images),
        given.multi_label,
        given.skipped,
        tuple(warnings),
    )


def _without_role(given: Given, part: Part) -> str:
    if not given.has_roles:
        return (
            f"{given.source} has no roles, so that --role {part} names none of its images; leave it out, "
            "or say "
            "--role all."
        )
    there = [role for role in ROLES if given.images.get(role)]
    return f"{given.source} has no {part} images but {' and '.join(there)} images: say --role {there[-1]}."


def _copies(images: Sequence[Image]) -> list[str]:
    """Content that is there more than once, which counts as often."""
    labels: dict[str, set[tuple[int, ...]]] = {}
    for image in images:
        labels.setdefault(image.key, set()).add(image.labels)
    again = len(images) - len(labels)
    torn = sum(len(found) > 1 for found in labels.values())
    told = []
    if again:
        told.append(f"{again} of the {len(images)} images are copies of others; each counts for itself.")
    if torn:
        told.append(f"{torn} images stand under more than one class; one of their answers is always wrong.")
    return told


def _learned(given: Given, images: Sequence[Image], part: Part, runs: Collection[Path]) -> list[str]:
    """Whether a network has learned from these images, or from some of them."""
    whole = [] if part == "test" else _of_the_run(given, runs)
    return whole or [told for run in runs if (told := _trained_on(images, run)) is not None]


def _trained_on(images: Sequence[Image], run: Path) -> str | None:
    _record(run).check_left(train_images.TRAIN_IMAGES_FILE)
    known = train_images.read_train_images(run)
    seen = sum(image.number in known for image in images)
    if not seen:
        return None
    were = f"{seen:,} of {counted(len(images), 'image')} {'was' if seen == 1 else 'were'}"
    return f"{were} trained on by {run.name}: on them the figures are better than on new ones."


def _of_the_run(given: Given, runs: Collection[Path]) -> list[str]:
    """Whether these are all the images of one of the runs."""
    for run in runs:
        record = _record(run)
        known = record.facts().get("data")
        if known is None:
            continue
        try:
            same = (
                given.assembled(read_config(run).get("select_fraction")).fingerprint == known["fingerprint"]
            )
        except UsageError:
            same = False
        if same:
            return [
                f"These are the images of {run.name} itself, which has learned from {known['train']} of "
                "them: "
                "the figures are better than on new ones. Without --data its test images alone are asked."
            ]
    return []


def own(runs: Sequence[Path], part: Part | None, progress: Progress) -> Chosen:
    """The images of the runs themselves, by default those of their test role.

    Raises:
        UsageError: they are no longer there, have changed since, or differ between the runs.
    """
    if not runs:
        raise UsageError(
            "--data is missing: what was named is no run folder, whose test images could be asked; name a "
            "folder "
            "of labelled images, as in --data photos/."
        )
    facts = [_record(run).facts().get("data") for run in runs]
    known = facts[0]
    for run, other in zip(runs, facts, strict=True):
        if other is None:
            raise UsageError(f"{run} has not come to its data yet; name labelled images with --data.")
        assert known is not None
        if other["fingerprint"] != known["fingerprint"]:
            raise UsageError(
                f"{runs[0].name} and {run.name} were made from different data; name the images to ask both "
                "about "
                "with --data."
            )
    assert known is not None
    config = read_config(runs[0])
    try:
        found = open_data(
            config["data"],
            data_dir=None if config.get("data_dir") is None else Path(config["data_dir"]),
            select_fraction=config.get("select_fraction"),
            progress=progress,
        )
    except UsageError as error:
        raise UsageError(
            f"{runs[0]} was made from {printable(str(config['data']))}, which cannot be read from here "
            f"({error}) "
            "Name labelled images with --data."
        ) from error
    if found.fingerprint != known["fingerprint"]:
        raise UsageError(
            f"{printable(str(config['data']))} is no longer what {runs[0]} was made from: images have "
            "come, gone, "
            "or changed. Name the images to ask about with --data."
        )
    part = part or "test"
    images = found.role(part) if part != "all" else tuple(i for role in ROLES for i in found.role(role))
    if not images:
        raise UsageError(f"{runs[0]} has no {part} images; say --role test.")
    warnings = []
    if part in ("train", "all"):
        warnings = ["The networks have learned from these images: the figures are better than on new ones."]
    elif part == "select":
        warnings = ["The select images have decided what ships: the figures are better than on new ones."]
    return Chosen(
        found.name,
        found.source,
        part,
        found.classes,
        images,
        found.multi_label,
        found.skipped,
        tuple(warnings),
    )


def _record(run: Path) -> RunFolder:
    record = RunFolder(run, writes=False)
    record.open(fresh=False)
    return record


def known_to_all(chosen: Chosen, networks: Sequence[Asked], *, ignore_unknown: bool) -> Chosen:
    """The images whose classes every network knows.

    Raises:
        UsageError: a class is not known, and it was not asked to pass over such; or the kinds differ.
    """
    several = networks[0].several
    for one in networks:
        if one.several != several:
            raise UsageError(
                f"{networks[0].name} and {one.name} cannot be compared: one answers with one label, the "
                "other "
                "with several."
            )
    if chosen.multi_label and not several:
        raise UsageError(
            f"{chosen.source} has images of several labels, and {networks[0].name} answers with one label; "
            "name images of one label each."
        )
    unknown = {name: one for one in reversed(networks) for name in chosen.shown if name not in one.labels}
    if not unknown:
        return chosen
    if not ignore_unknown:
        raise UsageError(_unknown(chosen, unknown))
    refused = {label for label, name in enumerate(chosen.classes) if name in unknown}
    # Of an image with several labels the others still count.
    kept = chosen.images if several else tuple(i for i in chosen.images if i.label not in refused)
    if not kept or not any(name not in unknown for name in chosen.shown):
        raise UsageError(f"None of the classes of {chosen.source} is known: {listed(list(unknown))}.")
    told = f"{listed(list(unknown))} {'is' if len(unknown) == 1 else 'are'} not known to the networks: "
    told += "passed over" if several else f"{len(chosen.images) - len(kept)} images were left out"
    return replace(chosen, images=kept, warnings=(*chosen.warnings, f"{told}."))


def _unknown(chosen: Chosen, unknown: dict[str, Asked]) -> str:
    names = [name for name in chosen.shown if name in unknown]
    network = unknown[names[0]]
    lower = {label.lower(): label for label in network.labels}
    near = [lower[one] for one in get_close_matches(names[0].lower(), lower, n=1, cutoff=0.7)]
    hint = f" ('{names[0]}' may be its '{near[0]}')" if near else ""
    return (
        f"{chosen.source} has images of {listed(names)}, which {network.name} does not know{hint}; it knows "
        f"{listed(list(network.labels), 12)}. Rename or remove {'it' if len(names) == 1 else 'them'}, or "
        "pass "
        "over such images with --ignore-unknown."
    )
