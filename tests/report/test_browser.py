"""The page in a real browser, where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from questpress.pipeline.api.compare import compare
from questpress.pipeline.report.pages.comparison import render_comparison
from tests.support.pages import html, markdown
from questpress.export.int8.results import FloatNode
from questpress.pipeline.runs.results import Report

from tests.support.pages import with_words
from tests.support import bench_reports, int8_reports, reports

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: looked for {', '.join(NAMES)}")


def opened(page: str, folder: Path, width: int, *more: str) -> list[str]:
    """What the browser's console said when the page was opened at this width."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", f"--screenshot={folder / 'page.png'}", *more, file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (folder / "page.png").exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    "report",
    [int8_reports.with_int8(), bench_reports.with_bench(), reports.bare()],
    ids=["int8", "bench", "bare"],
)
def test_browser_has_nothing_to_complain_about(report: Report, tmp_path: Path) -> None:
    assert opened(html(report), tmp_path, 1280) == []


MEASURE = """<script>
addEventListener('load', () => {
  const wrong = [];
  const shown = one => getComputedStyle(one).display !== 'none';
  for (const one of document.querySelectorAll('.tradeoff')) {
    const drawn = [...one.querySelectorAll('svg[role=img]')].filter(shown);
    const wanted = innerWidth > 960 ? 'wide' : 'narrow';
    if (drawn.length !== 1 || drawn[0].getAttribute('class') !== wanted) wrong.push(`${drawn.length} of two`);
  }
  for (const one of document.querySelectorAll('svg[role=img], img, .patches, .versus, .confusion')) {
    if (!shown(one)) continue;
    const box = one.getBoundingClientRect();
    const scrolls = one.closest('.scroll') !== null;
    if (box.width < 5 || box.height < 5) wrong.push('no size: ' + one.outerHTML.slice(0, 80));
    if (!scrolls && (box.left < 0 || box.right > innerWidth + 0.5)) wrong.push('outside: ' + one.outerHTML.slice(0, 80));
    if (one.tagName === 'IMG' && !one.naturalWidth) wrong.push('not drawn: ' + one.alt);
  }
  for (const one of document.querySelectorAll('svg text')) {
    const height = one.getBoundingClientRect().height;
    if (height && height < 10) wrong.push('tiny: ' + one.textContent + ' ' + height);
  }
  for (const one of document.querySelectorAll('table')) {
    if (MODE === 'print' && one.getBoundingClientRect().right > innerWidth + 0.5)
      wrong.push('cut: ' + one.querySelector('caption').textContent);
  }
  const ground = getComputedStyle(document.body).backgroundColor;
  const pictures = [...document.querySelectorAll('svg[role=img], img')].filter(shown).length;
  console.log('measured ' + JSON.stringify({width: innerWidth, wide: document.documentElement.scrollWidth, ground, pictures, wrong}));
});
</script>"""  # noqa: E501


def measured(page: str, folder: Path, widths: list[int], scheme: str) -> list[dict]:
    """What a script finds in the page at these widths: the page itself allows none, its copy does."""
    page = re.sub(r"<meta http-equiv=.*?>", "", page.replace("<details", "<details open"))
    if scheme == "print":
        page = page.replace("@media print", "@media all").replace("@media screen and", "@media tty and")
    script = MEASURE.replace("MODE", f"'{scheme}'")
    (folder / "measured.html").write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    # In frames: windows of a browser have a least width of their own.
    frames = "".join(
        f'<iframe src="measured.html" style="border: 0; width: {width}px; height: 800px"></iframe>'
        for width in widths
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    outer = f'<meta name="color-scheme" content="{"dark" if dark else "light"}">{frames}'
    told = opened(outer, folder, 1800, *dark)
    found = [json.loads(one[1]) for line in told if (one := re.search(r'"measured (\{.*\})"', line))]
    assert len(found) == len(widths), told
    return sorted(found, key=lambda one: one["width"])


def test_long_names_do_not_make_the_page_wider_than_the_window(tmp_path: Path) -> None:
    report = reports.full([f"{'long' * 9} name {i}" for i in range(12)])
    long = int8_reports.with_int8().model_copy(deep=True).int8
    for search in long:
        search.target = search.tried[0].name = search.file = "a/long/name" * 9
        search.not_timed = "".join(["long"] * 30)
        search.float_parts = [FloatNode(name="node" * 30, op_type="Op" * 20, why="reason" * 20)]
        search.worst = [("tensor" * 30, 3.0)]
    bench = bench_reports.bench(flags=[bench_reports.STEAL])
    for subject in bench.subjects:
        subject.key, subject.file = None, "a/long/name" * 9
    page = html(report.model_copy(update={"int8": long, "bench": bench}))
    for found, width in zip(measured(page, tmp_path, [390, 1280], "light"), (390, 1280), strict=True):
        assert found["wide"] <= found["width"] == width


def everything() -> Report:
    """A report with all the kinds of pictures there are."""
    return with_words().model_copy(
        update={"int8": int8_reports.with_int8().int8, "bench": bench_reports.with_bench().bench}
    )


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(252, 252, 251)"), ("dark", "rgb(20, 22, 26)")])
def test_every_picture_is_seen_on_a_phone_and_on_a_screen(scheme: str, ground: str, tmp_path: Path) -> None:
    phone, screen = measured(html(everything()), tmp_path, [390, 1280], scheme)
    for found, width in ((phone, 390), (screen, 1280)):
        assert found["wrong"] == []
        assert found["wide"] <= found["width"] == width
        assert found["ground"] == ground
        assert found["pictures"] > 25


def test_comparisons_picture_is_seen_on_a_phone_and_on_a_screen(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(reports.full().model_dump_json(), encoding="utf-8")
    page = render_comparison(compare(file, out=tmp_path / "out"))["comparison.html"]
    for found in measured(page, tmp_path, [390, 961], "light"):
        assert found["wrong"] == [] and found["wide"] <= found["width"]
        assert found["pictures"] == 1


def test_no_table_is_cut_in_print(tmp_path: Path) -> None:
    # 178 mm, what A4 has between the margins.
    [found] = measured(html(everything()), tmp_path, [673], "print")
    assert [one for one in found["wrong"] if not one.startswith("tiny")] == []
    assert found["ground"] == "rgb(255, 255, 255)"


def requests(page: str, folder: Path) -> set[str]:
    """Addresses that the page made the browser ask for."""
    opened(page, folder, 1280, f"--log-net-log={folder / 'net.json'}", "--net-log-capture-mode=Everything")
    log = json.loads((folder / "net.json").read_text(encoding="utf-8"))
    found = (event.get("params", {}) for event in log["events"])
    # The browser's own requests have no origin; those of a file's page come from an opaque one, "null".
    asked = {
        one["url"] for one in found if "url" in one and one.get("initiator") not in (None, "not an origin")
    }
    return {url for url in asked if not url.startswith(("file:", "data:"))}


def test_page_makes_no_request(tmp_path: Path) -> None:
    page = html(everything())
    assert requests(page, tmp_path) == set()
    beacon = '<img src="http://127.0.0.1:9/beacon">'
    open_page = re.sub(r"<meta http-equiv=.*?>", "", page).replace("</body>", f"{beacon}</body>")
    assert requests(open_page, tmp_path) == {"http://127.0.0.1:9/beacon"}, "a request would have been seen"
