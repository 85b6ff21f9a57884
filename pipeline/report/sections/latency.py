"""Latency in the report and the terminal: distributions, percentiles, speed-ups, cold start, throughput."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

import numpy as np

from ....export.results import ColdStart, DeviceBench, Latency, Percentile
from ...runs.results import Bench, Report
from .. import charts, format
from ..charts import Chart, Drawing, Position, Shape
from ..networks import ROLES, SpeedRatio
from ..page import Section
from ..tables import Attribute, Table, attribute_rows

NOT_WALL_TIME = ("neighbor", "steal", "throttled")
"""Flags for which wall time may not be reported."""
PERCENTILES = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p99_9": "p99.9"}
ROW = 40
HISTOGRAM_HEIGHT = 26
BINS = 40
MAX_RATIO = 3.0
"""The histogram ends at this multiple of the median; the fraction beyond it is written next to it."""


def section(report: Report) -> Section:
    """Return an empty section before the bench."""
    bench = report.bench
    if bench is None:
        return Section("Latency", "latency", tables=[devices(report.devices)])
    flags = [f"{format.threads(flag.threads)}, {flag.name}: {flag.sentence}" for flag in bench.flags]
    return Section(
        "Latency",
        "latency",
        text=[" ".join(protocol(bench, repeat_command(bench, report)))],
        warnings=[*flags, *(f"{format.capitalize(note)}." for note in bench.notes)],
        figures=[histograms(bench, threads) for threads in bench.threads],
        tables=[percentiles(bench), devices(report.devices), *other_tables(bench)],
        folded=[conditions(bench), files(bench)],
        command=bench.command if bench.command != report.command else "",
    )


def protocol(bench: Bench, repeat: str) -> list[str]:
    processes = max(condition.processes for condition in bench.conditions)
    pinned = any(condition.cores for condition in bench.conditions)
    runs = f" and {bench.samples:,} runs" if bench.samples else ""
    block = format.significant(max(condition.block_ms for condition in bench.conditions))
    return [
        f"Batch size 1, model only. Each file ran in {format.plural(processes, 'process', 'processes')} "
        f"({'pinned to one core per thread' if pinned else 'not pinned: this system cannot'}) for at least "
        f"{format.significant(bench.seconds)} s{runs} per thread count, after a warm-up until two windows "
        "agreed within 2 %.",
        f"Files alternated in blocks of {block} ms in random order (seed {bench.seed}); no run is discarded.",
        noise_summary(bench, repeat),
    ]


def noise_summary(bench: Bench, repeat: str) -> str:
    """Return what disturbed a bench, what is not reported for that reason, and how to ``repeat`` it."""
    if not bench.flags:
        return "No disturbance was detected (reference workload, system counters, repeated processes)."
    names = ", ".join(dict.fromkeys(flag.name for flag in bench.flags))
    disturbed = bench.disturbed_threads
    if not disturbed:
        return f"The measurement was disturbed ({names}): small differences are unreliable."
    flags = [flag for flag in bench.flags if flag.threads in disturbed and flag.name in NOT_WALL_TIME]
    sentence = f"The latency measurement was disturbed ({names}). {flags[0].sentence if flags else ''} "
    counts = " and ".join(format.threads(count) for count in disturbed)
    sentence += f"Latency is therefore not reported for {counts}"
    if any(speedup.clock == "processor" for speedup in bench.speedups):
        sentence += "; on 1 thread, networks are compared by processor time"
    return f"{sentence}. To repeat it, close other programs and run: {repeat}"


def repeat_command(bench: Bench, report: Report | None = None) -> str:
    if report is None or bench.command != report.command:
        return bench.command
    return f"compress bench {shlex.quote(str(report.config.get('out', 'RUN')))}"


def role(bench: Bench, subject: str) -> str:
    """Return the role of a network of the run, or the name of any other file."""
    key = next((file.key for file in bench.subjects if file.name == subject), None) or ""
    return f"Teacher {key.split()[1]}" if key.startswith("teacher ") else ROLES.get(key, subject)


def percentiles(bench: Bench) -> Table:
    """Return each latency with its percentiles and their intervals, as ``1.23 (1.21–1.26)``."""
    names = [name for name in PERCENTILES if any(name in latency.percentiles for latency in bench.latencies)]
    rows = [
        [
            role(bench, latency.subject),
            str(latency.threads),
            *(percentile(latency.percentiles.get(name)) for name in names),
            _ms(latency.mean),
            format.count(latency.n),
        ]
        for latency in bench.latencies
    ]
    few = [label for name, label in PERCENTILES.items() if name not in names and name != "p99_9"]
    note = "Milliseconds per image, with 95 % intervals."
    if few and len(bench.disturbed_threads) < len(bench.threads):
        note += f" Too few runs for {' and '.join(few)}."
    heads = ["", "threads", *(PERCENTILES[name] for name in names), "mean", "runs"]
    return _add_processor_time(bench, Table("Latency percentiles", heads, rows, note=note))


def brief_percentiles(bench: Bench) -> Table:
    """Return percentiles with the interval of the median only, for 80 columns."""
    names = ("p90", "p95", "p99")
    rows = [
        [
            role(bench, latency.subject),
            str(latency.threads),
            percentile(latency.percentiles.get("p50")),
            *(percentile(latency.percentiles.get(name)).partition(" ")[0] for name in names),
            format.count(latency.n),
        ]
        for latency in bench.latencies
    ]
    table = Table("Latency in ms, batch size 1", ["", "threads", "p50", *names, "runs"], rows)
    return _add_processor_time(bench, table)


def _add_processor_time(bench: Bench, table: Table) -> Table:
    """Insert a column for thread counts at which wall time is not reported, and drop empty columns."""
    disturbed = bench.disturbed_threads
    if not disturbed:
        return table
    rows = [
        [*row[:-1], _ms(latency.processor_ms if latency.threads in disturbed else None), row[-1]]
        for row, latency in zip(table.rows, bench.latencies, strict=True)
    ]
    columns = [*table.columns[:-1], "processor time", table.columns[-1]]
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] != format.MISSING for row in rows)]
    note = f"{table.note} Processor time: p1 of the runs, all threads together.".lstrip()
    return replace(
        table, columns=[columns[i] for i in kept], rows=[[row[i] for i in kept] for row in rows], note=note
    )


def percentile(value: Percentile | None) -> str:
    if value is None:
        return format.MISSING
    shown = format.significant(value.value)
    if value.low is None and value.high is None:
        return shown
    low, high = (format.significant(end) if end is not None else "" for end in (value.low, value.high))
    return f"{shown} ({low}–{high})"


def other_tables(bench: Bench) -> list[Table]:
    return [speedups(bench), end_to_end(bench), cold_starts(bench), throughput(bench)]


def speedups(bench: Bench) -> Table:
    """Return a row for each pair of files and a column for each thread count."""
    rows: dict[tuple[str, str], list[str]] = {}
    for speedup in bench.speedups:
        other = role(bench, speedup.over)
        if other.split()[0] in ("Teacher", "Student"):
            other = other[:1].lower() + other[1:]
        name = f"{role(bench, speedup.subject)} vs. {other}"
        ratio = SpeedRatio.from_speedup(speedup)
        row = rows.setdefault((speedup.subject, speedup.over), [name, *[format.MISSING] * len(bench.threads)])
        row[1 + bench.threads.index(speedup.threads)] = ratio.text
    heads = ["", *(format.threads(count) for count in bench.threads)]
    note = "Ratio of the medians, with its 95 % interval."
    if any(speedup.clock == "processor" for speedup in bench.speedups):
        note = "Ratio of the processor times, with its 95 % interval; wall time was disturbed."
    return Table("Speedup", heads, list(rows.values()), note=note)


def end_to_end(bench: Bench) -> Table:
    rows = [
        [
            role(bench, result.subject),
            *(_ms(value) for value in (result.decode, result.resize, result.normalize, result.run)),
            *(percentile(result.total.get(name)) for name in ("p50", "p90")),
        ]
        for result in bench.end_to_end
    ]
    threads = format.threads(bench.end_to_end[0].threads) if rows else ""
    note = f"Median milliseconds on {bench.images}, {threads}; Pillow decodes and resizes on one thread."
    columns = ["", "decode", "resize", "normalize", "model", "total p50", "total p90"]
    return Table("End-to-end latency, from image file to prediction", columns, rows, note=note)


def cold_starts(bench: Bench) -> Table:
    rows = [
        [
            role(bench, result.subject),
            *(_ms(value) for value in (result.import_ms, result.session_ms, result.first_run_ms)),
            format.megabytes(result.peak_bytes),
            format.megabytes(_model_bytes(result)),
        ]
        for result in bench.cold_starts
    ]
    note = ""
    for first in bench.cold_starts[:1]:
        note = f"Median milliseconds of {format.plural(first.processes, 'new process', 'new processes')}, "
        note += f"{format.threads(first.threads)}; the file is in the page cache."
    columns = ["", "import runtime", "load model", "first run", "peak memory", "of which model"]
    return Table("Cold start", columns, rows, note=note)


def _model_bytes(result: ColdStart) -> int | None:
    if result.peak_bytes is None or result.runtime_bytes is None:
        return None
    return max(0, result.peak_bytes - result.runtime_bytes)


def throughput(bench: Bench) -> Table:
    """Return a row for each file and a column for each batch size."""
    batches = sorted({result.batch for result in bench.throughput})
    throughputs = {(result.subject, result.batch): result.images_per_second for result in bench.throughput}
    rows = [
        [role(bench, subject), *(_ms(throughputs.get((subject, batch))) for batch in batches)]
        for subject in dict.fromkeys(result.subject for result in bench.throughput)
    ]
    note = f"Images per second, {format.threads(bench.throughput[0].threads)}." if rows else ""
    return Table("Throughput", ["", *(f"batch size {batch}" for batch in batches)], rows, note=note)


def devices(benches: Sequence[DeviceBench]) -> Table:
    """Return a row for each device, file and thread count."""
    rows = [
        [
            bench.device.processor,
            result.precision,
            str(result.threads),
            *(
                percentile(None if (result.name, result.threads) in waited else times.get("p50"))
                for times in (result.latency_ms, result.end_to_end_ms)
            ),
            _ms(result.processor_ms),
            _ms(result.load_ms),
        ]
        for bench in benches
        for waited in [_waited(bench)]
        for result in bench.results
    ]
    notes = ["Median milliseconds with 95 % intervals, mean processor time of all threads."]
    for bench in benches:
        device, version = bench.device, bench.versions.get("onnxruntime", "")
        memory = f"{format.significant(device.memory_bytes / 1e9)} GB, " if device.memory_bytes else ""
        notes.append(
            f"{device.processor}: {format.plural(device.cores, 'core')}, {memory}{device.system}, "
            f"onnxruntime {version} ({bench.provider}), {bench.images}."
        )
        notes += [f"{format.threads(flag.threads)}: {flag.sentence}" for flag in bench.flags]
    columns = ["device", "file", "threads", "p50", "from image file", "processor time", "load"]
    return Table("Devices", columns, rows, note=" ".join(notes), left=2)


def slowest_device(benches: Sequence[DeviceBench]) -> str | None:
    """Return the device whose fastest file has the longest latency; None unless several were timed."""
    timed = []
    for bench in benches:
        waited = _waited(bench)
        results = [r for r in bench.results if "p50" in r.latency_ms and (r.name, r.threads) not in waited]
        if results:
            best = min(results, key=lambda r: (r.threads, r.latency_ms["p50"].value))
            timed.append((best.latency_ms["p50"].value, bench.device.processor, best))
    if len(timed) < 2:
        return None
    p50, processor, result = max(timed, key=lambda entry: entry[:2])
    return (
        f"slowest of {len(timed)} devices: {processor}, p50 {format.milliseconds(p50)}, "
        f"{result.precision}, {format.threads(result.threads)}"
    )


def _waited(bench: DeviceBench) -> set[tuple[str, int]]:
    """Return the files and thread counts whose latency is not reported, as other processes used the cores."""
    return {(flag.file, flag.threads) for flag in bench.flags if flag.name == "neighbor"}


def files(bench: Bench) -> Table:
    versions = bench.environment
    rows = [
        [role(bench, f.name), f.file, f"{f.runtime} {versions.get(f.runtime, '')}".strip(), f.input, f.inputs]
        for f in bench.subjects
    ]
    columns = ["", "file", "runtime", "input", "input data"]
    return Table("Benchmarked files", columns, rows, code=frozenset({1}), text=True)


def conditions(bench: Bench) -> Table:
    """Return how each thread count was measured."""
    attributes: dict[str, Attribute] = {
        "pinned to cores": (lambda c: c.cores, lambda cores: ", ".join(map(str, cores)) or "none"),
        "CPU governor": (lambda c: c.governor or "unknown", str),
        "rounds of blocks": (lambda c: f"{c.rounds} of {_ms(c.block_ms)} ms", str),
        "processes per file": (lambda c: c.processes, str),
        "std between processes": (
            lambda c: c,
            lambda c: f"{c.process_spread:.2g} %{'' if c.process_spread_measured else ' (assumed)'}",
        ),
        "reference workload, p10–p90": (
            lambda c: c.sentinel_ms,
            lambda quantiles: f"{_ms(quantiles[0])}–{_ms(quantiles[2])} ms",
        ),
        "not monitored": (lambda c: ", ".join(c.unchecked) or "none", str),
        "session options": (lambda _: ", ".join(bench.session), str),
    }
    heads = ["", *(format.threads(condition.threads) for condition in bench.conditions)]
    return Table("Measurement conditions", heads, attribute_rows(bench.conditions, attributes), text=True)


def _ms(value: float | None) -> str:
    return format.MISSING if value is None else format.significant(value)


def histograms(bench: Bench, threads: int) -> Chart | None:
    """Draw the distribution of the latency of each network relative to its median; None without any."""
    shown = [latency for latency in bench.latencies if latency.threads == threads and latency.p50]
    if not shown:
        return None
    ratios = [np.array(latency.quantiles) / (latency.p50 or 1.0) for latency in shown]
    low = max(0.5, min(float(ratio[1]) for ratio in ratios))
    high = min(MAX_RATIO, max(1.15, *(float(ratio[99]) for ratio in ratios)))
    x = charts.linear_scale(low, high, charts.LABEL_WIDTH + 6, charts.WIDTH - charts.VALUE_WIDTH)
    height = 8 + len(shown) * ROW + 20
    step = charts.round_step((high - low) / 4)
    ticks = charts.axis_ticks(float(step * np.ceil(low / step)), high, step)
    shapes = charts.vertical_grid([(value, f"{number}×") for value, number in ticks], x, height)
    for i, (latency, ratio) in enumerate(zip(shown, ratios, strict=True)):
        shapes += _histogram(bench, latency, ratio, (low, high), x, 8 + i * ROW + HISTOGRAM_HEIGHT)
    rows = []
    for latency in shown:
        p90 = latency.percentiles.get("p90")
        tail = f", p90 {format.milliseconds(p90.value)}" if p90 is not None else ""
        rows.append(f"{role(bench, latency.subject)}: median {format.milliseconds(latency.p50)}{tail}")
    shapes.append(charts.line("level budget", x(1.0), 0, x(1.0), height - 18))
    return Chart(
        f"Latency distribution, {format.threads(threads)}",
        f"Distribution of runs, {format.threads(threads)}. {'; '.join(rows)}.",
        [Drawing(charts.WIDTH, height, shapes)],
        "runs relative to the median; the median is at the right",
    )


def _histogram(
    bench: Bench,
    latency: Latency,
    ratios: np.ndarray,
    ends: tuple[float, float],
    x: Position,
    base: float,
) -> list[Shape]:
    edges = np.linspace(*ends, BINS + 1)
    # The quantiles are the inverse of the distribution function; equal ones would make it vertical.
    rising = ratios + 1e-9 * np.arange(len(ratios))
    fractions = np.interp(edges, rising, np.arange(101) / 100)
    heights = np.diff(fractions)
    heights = heights / (heights.max() or 1.0)
    points = [(x(ends[0]), base)]
    for start, end, height in zip(edges, edges[1:], heights, strict=False):
        y = base - HISTOGRAM_HEIGHT * float(height)
        points += [(x(float(start)), y), (x(float(end)), y)]
    points.append((x(ends[1]), base))
    key = next((file.key for file in bench.subjects if file.name == latency.subject and file.key), "other")
    shapes = [
        charts.text("name", 0, base - 6, role(bench, latency.subject)),
        charts.polyline(f"histogram {key}", points, "polygon"),
        charts.text("number", charts.WIDTH - 70, base - 6, format.milliseconds(latency.p50)),
    ]
    if (p90 := latency.percentiles.get("p90")) is not None:
        ratio = p90.value / (latency.p50 or 1.0)
        if isfinite(ratio) and ends[0] <= ratio <= ends[1]:
            shapes.append(charts.path(f"whisker {key}", "M", x(ratio), base, "v-9", tooltip="p90"))
    if (beyond := 1 - float(fractions[-1])) >= 0.005:
        label = f"{format.percent(100 * beyond)} beyond"
        shapes.append(charts.text("tick", charts.WIDTH - 70, base + 7, label))
    return shapes
