"""Render reports; read their HTML as a browser would, and the shapes of charts."""

from html.parser import HTMLParser
from typing import Any

from questpress.pipeline.report.charts import Chart, Shape
from questpress.pipeline.report.render import render_html, render_markdown
from questpress.pipeline.report.run_report import report_page
from questpress.pipeline.runs.results import Report, ShownWord

from tests.support import bench_reports, int8_reports, reports

HOSTILE = [
    '<script>alert("x")</script>',
    "</style><img src=http://evil/x onerror=alert(1)>",
    "a|b\n# c",
    "`x` *y* _z_",
    "[l](http://evil)",
    "{{ 7 * 7 }}{% raw %}",
    "\"' onload='x",
    "\u202ename\u0000",
    "--><!--",
    "&lt;b&gt;",
]


def html(report: Report) -> str:
    return render_html(report_page(report))


def markdown(report: Report) -> str:
    return render_markdown(report_page(report))


class Reader(HTMLParser):
    """Collect tags, attributes and text, and check that tags are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def ids(self) -> list[str | None]:
        return [value for _, name, value in self.attributes if name == "id"]


def with_words(**more: Any) -> Report:
    report = reports.full()
    patches = [reports.png(i, 48) for i in range(6)]
    facts = {
        "usage": [(1, 2000), (2, 900), (704, 0)],
        "dead": 3,
        "shown": [
            ShownWord(rank=1, share=7.24, patches=patches),
            ShownWord(rank=351, share=0.1, patches=patches[:2]),
        ],
        "patch": 27,
        "seen": 256,
    }  # fmt: skip
    return report.model_copy(update={"words": [report.words[0].model_copy(update=facts | more)]})


def with_everything() -> Report:
    """Return a report with every kind of figure."""
    update = {"int8": int8_reports.with_int8().int8, "bench": bench_reports.with_bench().bench}
    return with_words().model_copy(update=update)


def shapes(chart: Chart, css: str, drawing: int = 0) -> list[Shape]:
    """Return the shapes of the class ``css``, which may be followed by others."""
    return [s for s in chart.drawings[drawing].shapes if f"{s.attributes['class']} ".startswith(f"{css} ")]


def center(circle: Shape) -> tuple[float, float]:
    return float(circle.attributes["cx"]), float(circle.attributes["cy"])


def points(line: Shape) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in line.attributes["points"].split())]
