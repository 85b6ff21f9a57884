"""Pages in a real browser, if there is one: they fit windows, phones and paper, and request nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from questpress.export.results import FloatNode
from questpress.pipeline.report.comparison_page import render_comparison
from questpress.pipeline.report.validation_page import render_validation

from tests.support import bench_reports, comparisons, int8_reports, reports
from tests.support.pages import html, with_everything

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: {', '.join(NAMES)}")


def report_with_long_names() -> str:
    report = reports.full([f"{'long' * 9} name {i}" for i in range(12)])
    searches = int8_reports.with_int8().model_copy(deep=True).int8
    for search in searches:
        search.target = search.tried[0].name = search.file = "a/long/name" * 9
        search.not_timed = "long" * 30
        search.float_parts = [FloatNode(name="node" * 30, op_type="Op" * 20, why="reason" * 20)]
        search.worst = [("tensor" * 30, 3.0)]
    bench = bench_reports.bench(flags=[bench_reports.STEAL])
    for subject in bench.subjects:
        subject.key, subject.file = None, "a/long/name" * 9
    return html(report.model_copy(update={"int8": searches, "bench": bench}))


PAGES = {
    "report": lambda: html(with_everything()),
    "long names": report_with_long_names,
    "bare": lambda: html(reports.bare()),
    "validation": lambda: render_validation(comparisons.validation())["validation.html"],
    "comparison": lambda: render_comparison(comparisons.comparison())["comparison.html"],
}


def open_page(page: str, folder: Path, width: int, *options: str) -> list[str]:
    """Open the page at this width and return what the browser's console printed."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", f"--screenshot={folder / 'page.png'}", *options, file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (folder / "page.png").exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


MEASURE = """<script>
addEventListener('load', () => {
  const wrong = [];
  const isShown = element => getComputedStyle(element).display !== 'none';
  for (const element of document.querySelectorAll('.wide-chart')) {
    const drawn = [...element.querySelectorAll('svg[role=img]')].filter(isShown);
    const wanted = innerWidth > 960 ? 'wide' : 'narrow';
    if (drawn.length !== 1 || drawn[0].getAttribute('class') !== wanted) wrong.push(`${drawn.length} of two`);
  }
  for (const element of document.querySelectorAll('svg[role=img], img, .patches, .versus, .confusion')) {
    if (!isShown(element)) continue;
    const box = element.getBoundingClientRect();
    const scrolls = element.closest('.scroll') !== null;
    if (box.width < 5 || box.height < 5) wrong.push('no size: ' + element.outerHTML.slice(0, 80));
    if (!scrolls && (box.left < 0 || box.right > innerWidth + 0.5)) wrong.push('outside: ' + element.outerHTML.slice(0, 80));
    if (element.tagName === 'IMG' && !element.naturalWidth) wrong.push('not drawn: ' + element.alt);
  }
  for (const element of document.querySelectorAll('svg text')) {
    const height = element.getBoundingClientRect().height;
    if (height && height < 10) wrong.push('tiny: ' + element.textContent + ' ' + height);
  }
  for (const element of document.querySelectorAll('table')) {
    if (MODE === 'print' && element.getBoundingClientRect().right > innerWidth + 0.5)
      wrong.push('cut: ' + element.querySelector('caption').textContent);
  }
  for (const element of document.querySelectorAll('.wide')) {
    element.scrollLeft = 200;
    for (const name of element.querySelectorAll('th:first-child'))
      if (name.getBoundingClientRect().left !== element.getBoundingClientRect().left) wrong.push('moved: ' + name.textContent);
  }
  const cut = [...document.querySelectorAll('.scroll')].filter(
    element => element.checkVisibility() && element.scrollWidth > element.clientWidth + 1 && element.querySelector('table:not(.confusion)')
      && !(element.previousElementSibling?.matches('.hint') && element.previousElementSibling.checkVisibility())
  ).map(element => element.querySelector('caption').textContent);
  const high = document.documentElement.scrollHeight;
  const ground = getComputedStyle(document.body).backgroundColor;
  const pictures = [...document.querySelectorAll('svg[role=img], img')].filter(isShown).length;
  console.log('measured ' + JSON.stringify({width: innerWidth, wide: document.documentElement.scrollWidth, ground, pictures, wrong, high, cut}));
});
</script>"""  # noqa: E501


def measure(page: str, folder: Path, widths: list[int], scheme: str, *, folded: bool = False) -> list[dict]:
    """Return what a script finds in a copy of the page, which allows scripts, at these widths."""
    page = re.sub(r"<meta http-equiv=.*?>", "", page if folded else page.replace("<details", "<details open"))
    if scheme == "print":
        page = page.replace("@media print", "@media all").replace("@media screen and", "@media tty and")
    script = MEASURE.replace("MODE", f"'{scheme}'")
    (folder / "measured.html").write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    # In frames, because windows of a browser have a minimum width.
    frames = "".join(
        f'<iframe src="measured.html" style="border: 0; width: {width}px; height: 800px"></iframe>'
        for width in widths
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    outer = f'<meta name="color-scheme" content="{"dark" if dark else "light"}">{frames}'
    lines = open_page(outer, folder, 1800, *dark)
    results = [json.loads(m[1]) for line in lines if (m := re.search(r'"measured (\{.*\})"', line))]
    assert len(results) == len(widths), lines
    return sorted(results, key=lambda result: result["width"])


@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_errors_and_fits_phones_and_screens(name: str, tmp_path: Path) -> None:
    page = PAGES[name]()
    assert open_page(page, tmp_path, 1280) == []
    for result, width in zip(measure(page, tmp_path, [390, 1280], "light"), (390, 1280), strict=True):
        assert result["wrong"] == []
        assert result["wide"] <= result["width"] == width
        assert result["ground"] == "rgb(252, 252, 251)"
        assert result["pictures"] > 25 or name != "report"


def test_pages_are_short_and_tables_that_scroll_have_a_hint_on_phones(tmp_path: Path) -> None:
    [phone, screen] = measure(html(with_everything()), tmp_path, [390, 1280], "light", folded=True)
    assert phone["high"] < 6_000 and screen["high"] < 4_500
    assert phone["cut"] == screen["cut"] == []
    [phone, screen] = measure(PAGES["comparison"](), tmp_path, [390, 1280], "light", folded=True)
    assert phone["cut"] == screen["cut"] == []


def test_page_has_a_dark_theme(tmp_path: Path) -> None:
    for result in measure(html(with_everything()), tmp_path, [390, 1280], "dark"):
        assert result["wrong"] == [] and result["ground"] == "rgb(20, 22, 26)"


def test_printed_tables_are_not_cut(tmp_path: Path) -> None:
    # 178 mm, the width of A4 between the margins.
    [result] = measure(html(with_everything()), tmp_path, [673], "print")
    assert [problem for problem in result["wrong"] if not problem.startswith("tiny")] == []
    assert result["ground"] == "rgb(255, 255, 255)"


def requested_urls(page: str, folder: Path) -> set[str]:
    open_page(page, folder, 1280, f"--log-net-log={folder / 'net.json'}", "--net-log-capture-mode=Everything")
    log = json.loads((folder / "net.json").read_text(encoding="utf-8"))
    events = [event.get("params", {}) for event in log["events"]]
    # Requests of the browser itself have no origin; those of a file's page have an opaque one, "null".
    urls = {
        event["url"]
        for event in events
        if "url" in event and event.get("initiator") not in (None, "not an origin")
    }
    return {url for url in urls if not url.startswith(("file:", "data:"))}


def test_page_requests_nothing(tmp_path: Path) -> None:
    page = html(with_everything())
    assert requested_urls(page, tmp_path) == set()
    beacon = '<img src="http://127.0.0.1:9/beacon">'
    open_policy = re.sub(r"<meta http-equiv=.*?>", "", page).replace("</body>", f"{beacon}</body>")
    assert requested_urls(open_policy, tmp_path) == {"http://127.0.0.1:9/beacon"}, "a request would be seen"
