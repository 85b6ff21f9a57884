"""What a bench says in tables: the terminal, the page and the Markdown file show the same."""

from collections.abc import Callable

from ...export.latency.results import Percentile, Speedup
from ..runs.bench_results import Bench
from . import format
from .tables import Table

SHOWN = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p99_9": "p99.9"}
ROLES = {"teacher": "Teacher", "student": "Student fp32", "student_int8": "Student int8"}


def role(bench: Bench, name: str) -> str:
    """What people read: of a run's own networks their role, of any other file its name."""
    keys = {one.name: one.key for one in bench.subjects}
    key = keys.get(name)
    if key in ROLES:
        return ROLES[str(key)]
    if key is not None and key.startswith("teacher "):
        return f"Teacher {key.split()[1]}"
    return name


def percentiles(bench: Bench) -> Table:
    """With the interval of each percentile below it, as ``1.23 (1.21–1.26)``."""
    names = [name for name in SHOWN if any(name in one.percentiles for one in bench.latencies)]
    rows = [
        [
            role(bench, one.subject),
            str(one.threads),
            *(interval(one.percentiles.get(name)) for name in names),
            format.milliseconds(one.mean)[:-3],
            format.count(one.n),
        ]
        for one in bench.latencies
    ]
    left_out = [shown for name, shown in SHOWN.items() if name not in names and name != "p99_9"]
    note = "Milliseconds of one image, the model alone, with 95 % intervals."
    if left_out:
        note += f" Too few runs for {' and '.join(left_out)}."
    columns = ["", "threads", *(SHOWN[name] for name in names), "mean", "runs"]
    return Table("Percentiles", columns, rows, note=note)


def interval(one: Percentile | None) -> str:
    if one is None:
        return format.MISSING
    value = format.significant(one.value)
    if one.low is None and one.high is None:
        return value
    ends = [format.significant(end) if end is not None else "" for end in (one.low, one.high)]
    return f"{value} ({'–'.join(ends)})"


def speedups(bench: Bench) -> Table:
    counts = bench.threads
    rows: dict[tuple[str, str], list[str]] = {}
    for one in bench.speedups:
        name = f"{role(bench, one.subject)} against {lower(role(bench, one.over))}"
        row = rows.setdefault((one.subject, one.over), [name, *[format.MISSING] * len(counts)])
        row[1 + counts.index(one.threads)] = in_words(one)
    note = "Ratio of the medians of each round, with its 95 % interval."
    columns = ["", *(format.threads(str(count)) for count in counts)]
    return Table("Against each other", columns, list(rows.values()), note=note)


def lower(text: str) -> str:
    """A role within a sentence; names of files stay as they are."""
    return text[:1].lower() + text[1:] if text.split()[0] in ("Teacher", "Student") else text


def in_words(one: Speedup) -> str:
    """2.10× faster (2.05–2.14×); no difference (0.98–1.02×); 1.30× slower (1.25–1.35×)."""
    if one.verdict == "no difference":
        return f"no difference ({format.times_interval(one.low, one.high)})"
    if one.verdict == "slower":
        return f"{format.times(1 / one.ratio)} slower ({format.times_interval(1 / one.high, 1 / one.low)})"
    return f"{format.times(one.ratio)} faster ({format.times_interval(one.low, one.high)})"


def end_to_end(bench: Bench) -> Table:
    rows = [
        [
            role(bench, one.subject),
            *(_ms(value) for value in (one.decode, one.resize, one.normalize, one.run)),
            interval(one.total.get("p50")),
            interval(one.total.get("p90")),
        ]
        for one in bench.end_to_end
    ]
    note = ""
    if rows:
        threads = format.threads(str(bench.end_to_end[0].threads))
        note = f"Median milliseconds on {bench.images}, {threads}; Pillow decodes and resizes on one."
    columns = ["", "decode", "resize", "normalize", "run", "all together", "p90"]
    return Table("From image file to answer", columns, rows, note=note)


def cold_starts(bench: Bench) -> Table:
    rows = [
        [
            role(bench, one.subject),
            _ms(one.import_ms),
            _ms(one.session_ms),
            _ms(one.first_run_ms),
            format.megabytes(one.peak_bytes),
            format.megabytes(_own(one.peak_bytes, one.runtime_bytes)),
        ]
        for one in bench.cold_starts
    ]
    note = ""
    if rows:
        first = bench.cold_starts[0]
        note = (
            f"Medians of {format.counted(first.processes, 'fresh process', 'fresh processes')}, "
            f"milliseconds, {format.threads(str(first.threads))}; the file lies in the system’s cache."
        )
    columns = ["", "import runtime", "open file", "first run", "peak memory", "of which the file’s"]
    return Table("Cold start", columns, rows, note=note)


def _own(peak: int | None, runtime: int | None) -> int | None:
    return None if peak is None or runtime is None else max(0, peak - runtime)


def throughput(bench: Bench) -> Table:
    """A row for each file, a column for each batch."""
    batches = sorted({one.batch for one in bench.throughput})
    names = dict.fromkeys(one.subject for one in bench.throughput)
    found = {(one.subject, one.batch): one for one in bench.throughput}
    rows = []
    for name in names:
        rates = [found.get((name, batch)) for batch in batches]
        rows.append(
            [
                role(bench, name),
                *(
                    format.MISSING if one is None else format.significant(one.images_per_second)
                    for one in rates
                ),
            ]
        )
    note = ""
    if rows:
        note = f"Images a second at each batch, {format.threads(str(bench.throughput[0].threads))}."
    return Table("Throughput", ["", *(f"batch {batch}" for batch in batches)], rows, note=note)


def files(bench: Bench) -> Table:
    rows = [
        [
            role(bench, one.name),
            one.file,
            format.megabytes(one.bytes),
            _runtime(bench, one.runtime),
            one.input,
            one.inputs,
            one.sha256,
        ]
        for one in bench.subjects
    ]
    columns = ["", "file", "size", "runtime", "input", "given", "sha256"]
    return Table("Files timed", columns, rows, code=frozenset({1, 6}), text=True)


def _runtime(bench: Bench, name: str) -> str:
    version = bench.environment.get(name)
    return f"{name} {version}" if version else name


def conditions(bench: Bench) -> Table:
    """How each thread count was measured."""

    def row(name: str, value: Callable[[int], str]) -> list[str]:
        return [name, *(value(i) for i in range(len(bench.conditions)))]

    each = bench.conditions
    rows = [
        row("cores pinned to", lambda i: ", ".join(map(str, each[i].cores)) or "none"),
        row("governor", lambda i: each[i].governor or "not told"),
        row("rounds, of blocks", lambda i: f"{each[i].rounds}, {format.significant(each[i].block_ms)} ms"),
        row("processes of each file", lambda i: str(each[i].processes)),
        row(
            "spread between them",
            lambda i: (
                format.significant(each[i].process_spread, 2)
                + (" %" if each[i].process_spread_measured else " % assumed")
            ),
        ),
        row("sentinel, p10–p90", lambda i: _sentinel(each[i].sentinel_ms)),
        row("not checked", lambda i: ", ".join(each[i].unchecked) or "nothing"),
    ]
    columns = ["", *(format.threads(str(one.threads)) for one in each)]
    return Table("How it was measured", columns, rows, text=True)


def _sentinel(readings: tuple[float, float, float]) -> str:
    low, _, high = (format.significant(one) for one in readings)
    return f"{low}–{high} ms"


def machine(bench: Bench) -> Table:
    rows = [[name, value] for name, value in bench.environment.items() if value]
    rows += [["session options", one] for one in bench.session]
    return Table("Machine and runtime", ["", ""], rows, text=True)


def _ms(value: float | None) -> str:
    return format.MISSING if value is None else format.significant(value)
