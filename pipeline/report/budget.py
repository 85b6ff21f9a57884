"""What int8 may cost and what it costs, in sentences; where nothing holds the budget, what ships instead."""

from ..runs.results import Int8Search, Report, TriedInt8
from . import format
from .networks import measure

ROLES = {"train": "training"}


def first(report: Report) -> Int8Search | None:
    """The search for the default target; None as long as there was none."""
    return report.int8[0] if report.int8 else None


def shipping(search: Int8Search) -> TriedInt8 | None:
    return next((one for one in search.tried if one.ships), None)


def fp32_ships(report: Report) -> str | None:
    """Where the default target has no int8 file: that, and why; else None."""
    search = first(report)
    if search is None or search.file is not None:
        return None
    return f"The fp32 file ships: {none_holds(report, search)}."


def none_holds(report: Report, search: Int8Search) -> str:
    """Of 9 int8 candidates for arm64 none keeps within 0.5 points …; the best, minmax, loses 1.7 points."""
    counted = format.counted(len(search.tried), "int8 candidate")
    told = f"of {counted} for {search.target} none {_within(report, search)} on {images(search)}"
    best = min(search.tried, key=lambda one: one.lost, default=None)
    if best is not None:
        told += f"; the best, {best.name}, loses {format.points(best.lost, search.n)[1:]}"
    return told


def keeps(report: Report, search: Int8Search) -> str:
    """How the candidates fared, and which one ships."""
    ships = shipping(search)
    if ships is None:
        told = none_holds(report, search)
        return f"{told[:1].upper()}{told[1:]}: no int8 file ships for {search.target}."
    every, holding = len(search.tried), sum(one.holds for one in search.tried)
    told = f"Of {every:,} candidates {holding:,}"
    if holding == every:
        told = {1: "The only candidate", 2: "Both candidates"}.get(every, f"All {every:,} candidates")
    told += f" {_within(report, search, 'keep' if holding > 1 else 'keeps')} on {images(search)}"
    which = "the most accurate of them" if holding > 1 else "it"
    return f"{told}; {which} ships: {ships.name}, {change(ships.lost, search.n)}."


def missed(search: Int8Search, qat: bool) -> str | None:
    """Where what ships loses more than the budget: by how much, why it ships, and what to do; else None.

    Args:
        qat: whether the student has learned on as the int8 network.
    """
    ships = shipping(search)
    if ships is None or ships.lost <= search.max_drop:
        return None
    lost = format.counted(round(search.n * ships.lost / 100), "image")
    return (
        f"int8 for {search.target} loses {ships.lost:.2f} points on {images(search)}, more than the "
        f"{search.max_drop:g} of --max-drop. It ships all the same, since the loss is {lost}, and one or two "
        f"may be chance. {remedies(qat)}"
    )


def remedies(qat: bool) -> str:
    """What to do where int8 costs too much."""
    fp32 = "compress predict RUN --file student.onnx asks the fp32 file, which loses nothing"
    learn = "compress export RUN --qat lets the student learn on as the int8 network, to lose less; "
    return f"Remedy: {fp32}." if qat else f"Remedies: {learn}{fp32}."


def images(search: Int8Search) -> str:
    return format.counted(search.n, f"{ROLES.get(search.role, search.role)} image")


def _within(report: Report, search: Int8Search, verb: str = "keeps") -> str:
    """keeps within 0.5 points of fp32's accuracy."""
    of = f"fp32’s {measure(report)}"
    return f"{verb} within {search.max_drop:g} points of {of}" if search.max_drop else f"{verb} {of}"


def change(lost: float, n: int) -> str:
    """A loss as what it changes: −1.7 points."""
    return format.points(round(-lost, 6) + 0.0, n)


def notes(report: Report) -> list[str]:
    """What of int8 must not be overlooked, besides `fp32_ships`: targets without a file, and slow ones."""
    found = []
    for place, search in enumerate(report.int8):
        if place and search.file is None:
            found.append(f"No int8 file for {search.target}: {none_holds(report, search)}.")
        if search.slow is not None:
            slow = f"{search.slow[:1].upper()}{search.slow[1:]}"
            found.append(f"{search.target}: {search.slow}" if place else slow)
    return found
