"""Int8 in the report: the candidates of each target, nodes in float, quantization-aware training."""

from math import inf

from ....export.results import Candidate
from ...runs.results import Int8Search, Report
from .. import format
from ..charts import Chart
from ..networks import find_task, score_name
from ..page import Section
from ..scatter import Level, Point, scatter
from ..tables import Table

QAT = "learned"
"""Name of the candidate of quantization-aware training."""
TEXT_COLUMNS = ("no.", "candidate", "result", "calibration", "corrections")


def section(report: Report) -> Section:
    parts = [_target(report, search) for search in report.int8]
    return Section("Int8 quantization", "int8", sections=[*parts, _qat(report)])


def default_search(report: Report) -> Int8Search | None:
    """Return the search for the default target; None before it is done."""
    return report.int8[0] if report.int8 else None


def shipped_candidate(search: Int8Search) -> Candidate | None:
    return next((candidate for candidate in search.tried if candidate.ships), None)


def explain_fp32(report: Report) -> str | None:
    """Return why the fp32 file ships; None if the default target has an int8 file, or no search yet."""
    search = default_search(report)
    if search is None or search.file is not None:
        return None
    return f"The fp32 file ships: {_explain_none(report, search)}."


def _explain_none(report: Report, search: Int8Search) -> str:
    reason = f"no int8 candidate of {len(search.tried):,} for {search.target} "
    reason += f"{_within_budget(report, search)} on {images(search)}"
    best = min(search.tried, key=lambda candidate: candidate.lost, default=None)
    if best is not None:
        reason += f"; the best, {best.name}, loses {format.points(best.lost, search.n)[1:]}"
    return reason


def _within_budget(report: Report, search: Int8Search, verb: str = "is") -> str:
    limit = f"within {search.max_drop:g} points of" if search.max_drop else "not below"
    return f"{verb} {limit} the fp32 {score_name(report)}"


def images(search: Int8Search) -> str:
    return format.images(search.n, search.role)


def explain_excess(search: Int8Search, qat: bool) -> str | None:
    """Return a warning if the shipped candidate, trained with or without ``qat``, exceeds the budget."""
    shipped = shipped_candidate(search)
    if shipped is None or shipped.lost <= search.max_drop:
        return None
    lost = format.plural(round(search.n * shipped.lost / 100), "image")
    return (
        f"int8 for {search.target} loses {shipped.lost:.2f} points on {images(search)}, more than --max-drop "
        f"{search.max_drop:g}. It ships because this is {lost} only, which may be chance. "
        f"{suggest_remedies(qat)}"
    )


def suggest_remedies(qat: bool) -> str:
    """Return what to do if int8 loses too much accuracy."""
    fp32 = "use the fp32 file, which loses nothing (compress predict RUN --file student.onnx)"
    if qat:
        return f"To avoid the loss, {fp32}."
    retrain = "fine-tune the student as an int8 network (compress export RUN --qat)"
    return f"To reduce the loss, {retrain}, or {fp32}."


def warnings(report: Report) -> list[str]:
    """Return targets without an int8 file, except the default one, and targets on which int8 is slow."""
    messages = []
    for i, search in enumerate(report.int8):
        if i and search.file is None:
            messages.append(f"No int8 file for {search.target}: {_explain_none(report, search)}.")
        if search.slow is not None:
            messages.append(f"{search.target}: {search.slow}" if i else format.capitalize(search.slow))
    return messages


def _target(report: Report, search: Int8Search) -> Section:
    return Section(
        f"Candidates for {search.target}",
        text=[" ".join(_sentences(report, search))],
        figures=[chart(report, search)],
        tables=[candidates(report, search)],
        folded=[
            Table(
                f"Most sensitive tensors, {search.target}",
                ["tensor", "SQNR"],
                [[name, decibels(sqnr)] for name, sqnr in search.worst],
                note="SQNR of the logits if only this tensor is quantized, worst first.",
                code=frozenset({0}),
            ),
            Table(
                f"Nodes that run in float, {search.target}",
                ["node", "operator", "reason"],
                [[node.name, node.op_type, node.why] for node in search.float_parts],
                note="Nodes of the graph as optimized by ONNX Runtime on this machine, in their order.",
                code=frozenset({0, 1}),
                text=True,
            ),
        ],
    )


def _sentences(report: Report, search: Int8Search) -> list[str]:
    """Return which candidate ships and why, its test score, and what could not be measured."""
    sentences = [_choice(report, search)]
    if search.file is not None and search.test_score is not None:
        sentence = f"{format.title(score_name(report))} of {search.file} on "
        sentence += f"{format.plural(search.test_score.n, 'test image')}: {format.score(search.test_score)}"
        if report.student is not None and report.student.score is not None:
            sentence += f", fp32 {format.score_percent(report.student.score)}"
        sentences.append(f"{sentence}.")
    if search.not_timed is not None:
        sentences.append(f"Latency not measured: {search.not_timed}.")
    if search.slow is not None:
        sentences.append(format.capitalize(search.slow))
    return sentences


def _choice(report: Report, search: Int8Search) -> str:
    shipped = shipped_candidate(search)
    if shipped is None:
        reason = format.capitalize(_explain_none(report, search))
        return f"{reason}: no int8 file ships for {search.target}."
    within = sum(candidate.holds for candidate in search.tried)
    sentence = f"{within:,} of {format.plural(len(search.tried), 'candidate')} "
    sentence += f"{_within_budget(report, search, 'are' if within > 1 else 'is')} on {images(search)}"
    if any(candidate.lost > search.max_drop and candidate.holds for candidate in search.tried):
        sentence += ", or lose one or two images only, which may be chance"
    which = "The most accurate one" if within > 1 else "It"
    return f"{sentence}. {which} ships: {shipped.name}, {_difference(shipped, search)}."


def _difference(candidate: Candidate, search: Int8Search) -> str:
    return format.points(round(-candidate.lost, 6) + 0.0, search.n)


def chart(report: Report, search: Int8Search) -> Chart | None:
    """Draw the score that decides over the median latency on one thread; None if nothing was timed."""
    if all(candidate.p50 is None for candidate in search.tried):
        return None
    files = [
        ("student_int8" if c.ships else "holds" if c.holds else "refused", str(i), c.name, c.score, c.p50)
        for i, c in enumerate(search.tried, 1)
    ]
    files.append(("student", "fp32", "", search.fp32_score, search.p50_fp32))
    shipped, points = shipped_candidate(search), []
    for key, label, name, score, p50 in files:
        if p50 is not None:
            text = f"{format.percent(score, search.n)} at {format.milliseconds(p50)}"
            points.append(Point(f"{label} {name}".strip(), key, p50, score, text, label=label))
    meanings = {
        "student": "fp32",
        "refused": "over budget",
        "holds": "within budget",
        "student_int8": f"shipped: {shipped.name}" if shipped else "shipped",
    }
    keys, least = {point.key for point in points}, search.fp32_score - search.max_drop
    levels = [Level(f"fp32 {format.percent(search.fp32_score, search.n)}", "student", search.fp32_score)]
    if search.max_drop:
        levels.append(Level(f"budget {format.percent(least, search.n)}", "budget", least))
    return scatter(
        f"{format.title(score_name(report))} over latency",
        points,
        x_name="median latency in ms, 1 thread",
        note=f"On {images(search)}. Numbers as in the table.",
        legend=[(key, meaning) for key, meaning in meanings.items() if key in keys],
        levels=levels,
        show_frontier=False,
    )


def candidates(report: Report, search: Int8Search) -> Table:
    """Return fp32 and the candidates as tried, without columns that are empty or repeat their names."""
    fp32 = {
        "candidate": "fp32",
        "result": format.MISSING if search.file is not None else "ships",
        score_name(report): format.percent(search.fp32_score, search.n),
        "latency": format.milliseconds(search.p50_fp32),
        "file": format.megabytes(report.student.bytes if report.student is not None else None),
    }
    rows = [_row(report, number, candidate, search) for number, candidate in enumerate(search.tried, 1)]
    columns = [
        name
        for name in (rows[0] if rows else {})
        if name == "candidate" or any(row[name] not in (format.MISSING, row["candidate"]) for row in rows)
    ]
    note = f"{format.title(score_name(report))} on {images(search)}. "
    note += "SQNR: signal-to-quantization-noise ratio of the logits."
    note += f" p: {find_task(report).test_name} against fp32." if "p" in columns else ""
    note += " Latency: median on 1 thread." if "latency" in columns else ""
    note += " Speedup: over fp32, with 95 % interval." if "speedup" in columns else ""
    return Table(
        f"Candidates for {search.target}",
        columns,
        [[row.get(name, format.MISSING) for name in columns] for row in (fp32, *rows)] if columns else [],
        note=note,
        left=sum(name in TEXT_COLUMNS for name in columns),
    )


def _row(report: Report, number: int, candidate: Candidate, search: Int8Search) -> dict[str, str]:
    applied = {"equalized": candidate.equalized, "bias": candidate.bias_corrected}
    return {
        "no.": str(number),
        "candidate": candidate.name,
        "result": "ships" if candidate.ships else "within budget" if candidate.holds else "over budget",
        "calibration": candidate.calibration,
        "corrections": ", ".join(name for name in applied if applied[name]) or format.MISSING,
        "float nodes": f"{len(candidate.kept_float):,}" if candidate.kept_float else format.MISSING,
        score_name(report): format.percent(candidate.score, search.n),
        "vs. fp32": _difference(candidate, search),
        "p": format.MISSING if candidate.p is None else format.p_value(candidate.p),
        "SQNR": decibels(candidate.sqnr),
        "latency": format.milliseconds(candidate.p50),
        "speedup": format.speedup(candidate.speedup),
        "file": format.megabytes(candidate.bytes),
    }


def decibels(sqnr: float) -> str:
    return "no error" if sqnr == inf else f"{format.significant(sqnr)} dB"


def _qat(report: Report) -> Section:
    """Compare the fake-quantized network and its int8 file on the same images."""
    recovery, search = report.recovery, default_search(report)
    name = "Quantization-aware training"
    if recovery is None:
        return Section(name)
    candidate = next((c for c in search.tried if c.name == QAT), None) if search else None
    rows = []
    if recovery.fake_val is not None:
        on_val = search if search is not None and search.role == "val" else None
        score = candidate.score if candidate is not None and on_val is not None else None
        rows.append(_compare("validation", on_val.n if on_val else None, recovery.fake_val, score))
    if recovery.fake_test is not None:
        test = report.student_int8.score if report.student_int8 is not None else None
        score = test.percent if candidate is not None and candidate.ships and test is not None else None
        rows.append(_compare("test", test.n if test else None, recovery.fake_test, score))
    text = f"The student was fine-tuned with fake quantization for {format.plural(recovery.epochs, 'epoch')}."
    shipped = shipped_candidate(search) if search is not None else None
    if search is not None and shipped is None:
        text += " It is over budget too, so the test score of its int8 file was not measured."
    elif shipped is not None and shipped.name == QAT:
        text += " Its int8 file ships."
    elif shipped is not None:
        text += f" Another candidate ships ({shipped.name}), so the test score of its file was not measured."
    note = f"{format.title(score_name(report))} of the fake-quantized network in PyTorch, "
    note += "and of its int8 file in ONNX Runtime."
    columns = ["split", "images", "fake-quantized", "int8 file", "difference"]
    return Section(name, text=[text], tables=[Table(name, columns, rows, note=note)])


def _compare(split: str, n: int | None, fake: float, score: float | None) -> list[str]:
    difference = format.MISSING if score is None else format.points(round(score - fake, 6) + 0.0, n)
    return [split, format.count(n), format.percent(fake, n), format.percent(score, n), difference]
