"""The page in a real browser, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from questpress.pipeline.int8_results import FloatPart
from questpress.pipeline.report.write import html
from questpress.pipeline.results import Report

from . import bench_reports, int8_reports, reports

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: looked for {', '.join(NAMES)}")


def opened(page: str, folder: Path, width: int) -> list[str]:
    """What the browser's console said when the page was opened at this width."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", f"--screenshot={folder / 'page.png'}", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (folder / "page.png").exists(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    "report",
    [int8_reports.with_int8(), bench_reports.with_bench(), reports.bare()],
    ids=["int8", "bench", "bare"],
)
def test_the_browser_has_nothing_to_complain_about(report: Report, tmp_path: Path) -> None:
    assert opened(html(report), tmp_path, 1280) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_not_wider_than_the_window(width: int, tmp_path: Path) -> None:
    # The page itself allows no script; the copy that is measured does.
    report = reports.full([f"{'long' * 9} name {i}" for i in range(12)])
    long = int8_reports.with_int8().model_copy(deep=True).int8
    for search in long:
        search.target = search.tried[0].name = search.file = "a/long/name" * 9
        search.not_timed = "".join(["long"] * 30)
        search.float_parts = [FloatPart(name="node" * 30, op_type="Op" * 20, why="reason" * 20)]
        search.worst = [("tensor" * 30, 3.0)]
    bench = bench_reports.bench(flags=[bench_reports.STEAL])
    for subject in bench.subjects:
        subject.key, subject.file = None, "a/long/name" * 9
    page = html(report.model_copy(update={"int8": long, "bench": bench}))
    page = page.replace("<details", "<details open")
    page = re.sub(r"<meta http-equiv=.*?>", "", page)
    wide = "'wide ' + document.documentElement.scrollWidth + ' of ' + innerWidth"
    measure = f"<script>console.log({wide})</script>"
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{measure}</body>"), encoding="utf-8")
    # In a frame: windows of a browser have a least width of their own.
    frame = f'<iframe src="measured.html" style="border: 0; width: {width}px; height: 800px"></iframe>'
    told = "".join(opened(frame, tmp_path, 1400))
    found = re.search(r"wide (\d+) of (\d+)", told)
    assert found, told
    assert int(found[1]) <= int(found[2]) == width
