"""What ``compare.py`` found, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cells import markdown
from benchmarks.int8.files import KINDS

Cell = Mapping[str, Any]


def tables(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    """Latency, ours against each other subject, the files, and what is to be said of them."""
    if not cells:
        return "nothing is done yet\n"
    machine, made_with = cells[0]["environment"], cells[0]["made_with"]
    tools = ", ".join(f"{name} {number}" for name, number in made_with["versions"].items())
    images = made_with["images"]
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}; {tools}; "
            f"{images['calibration']} calibration images of {images['data']}, {images['size']} px; "
            f"{made_with['seconds']:g} s for each subject.\n",
            "p50, ms:\n",
            latencies(cells, kinds),
            "How many times faster ours is, with its 95 % interval:\n",
            ratios(cells, kinds),
            "The files: MB, signal to noise of the logits against fp32, SHA-256:\n",
            files(cells, kinds),
            *(f"- {note}" for note in notes(cells)),
        ]
    )


def latencies(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    header = ["network", "threads", *(KINDS[kind].title for kind in kinds)]
    rows = [[*_row(cell), *(_p50(cell["latencies"].get(kind)) for kind in kinds)] for cell in cells]
    return markdown(header, rows)


def ratios(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    others = [kind for kind in kinds if kind != "ours"]
    header = ["network", "threads", *(KINDS[kind].title for kind in others)]
    rows = [[*_row(cell), *(_ratio(cell, kind) for kind in others)] for cell in cells]
    return markdown(header, rows)


def files(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    own = [kind for kind in kinds if KINDS[kind].file_of is None]
    by_model = {cell["model"]: cell["files"] for cell in cells}
    rows = [
        [
            model,
            KINDS[kind].title,
            f"{found[kind]['bytes'] / 1e6:.2f}",
            "" if found[kind]["logits_db"] is None else f"{found[kind]['logits_db']:.1f} dB",
            found[kind]["sha256"][0][:16],
        ]
        for model, found in by_model.items()
        for kind in own
        if found[kind]["error"] is None
    ]
    return markdown(["network", "file", "MB", "logits", "SHA-256"], rows)


def notes(cells: Sequence[Cell]) -> list[str]:
    """What a reader of the figures has to know: files that weren't made, and a restless machine."""
    said = [file["error"] for cell in cells for file in cell["files"].values() if file["error"]]
    said += [
        f"{cell['model']} on {_threads(cell)}: the warm-up of {KINDS[kind].title} did not settle within 2 %"
        for cell in cells
        for kind, found in cell["latencies"].items()
        if not found["settled"]
    ]
    busy = [cell for cell in cells if (cell["environment"]["load"] or 0) > cell["environment"]["cores"] / 2]
    if busy:
        said.append(f"other work was running at the start of {len(busy)} of {len(cells)} rows")
    return list(dict.fromkeys(said))


def _row(cell: Cell) -> list[str]:
    return [cell["model"], str(cell["threads"])]


def _threads(cell: Cell) -> str:
    return f"{cell['threads']} thread" + ("s" if cell["threads"] > 1 else "")


def _p50(found: Mapping[str, Any] | None) -> str:
    p50 = found and found["percentiles"].get("p50")
    return f"{p50['value']:.3g}" if p50 else "–"


def _ratio(cell: Cell, kind: str) -> str:
    found = cell["ours_against"].get(kind)
    if found is None:
        of_both = [cell["files"].get(name, {}).get("sha256") for name in ("ours", kind)]
        return "the same file" if of_both[0] == of_both[1] else "–"
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f}), {found['verdict']}"
