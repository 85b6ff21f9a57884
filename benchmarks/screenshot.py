"""A picture of a page in a browser, such as docs/report.png.

    python -m benchmarks.screenshot runs/clothing docs/report.png
    python -m benchmarks.screenshot comparison/comparison.html comparison.png --height 1260

It needs Chromium or Chrome. A run's report is rendered again first, as by `compress report`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from PIL import Image
from questpress.pipeline.api.report import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MOST_BYTES = 300_000


def picture(page: Path, file: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Save the first ``height`` pixels of a page at this width."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise click.ClickException(f"no browser found: looked for {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={file}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not file.exists():
        raise click.ClickException(f"the browser made no picture: {done.stderr.strip()}")


def shrink(file: Path) -> None:
    """Reduce a picture to 128 colors, which are enough for a page and make a small file."""
    with Image.open(file) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--width", default=1280, show_default=True)
@click.option("--height", default=1500, show_default=True)
@click.option("--dark", is_flag=True)
def main(run: Path, file: Path, width: int, height: int, dark: bool) -> None:
    """Picture the report of RUN, or a page, into FILE, a PNG."""
    if run.suffix == ".html":
        picture(run, file, width, height, dark=dark)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(run, Path(folder))
            picture(Path(folder) / "report.html", file, width, height, dark=dark)
    shrink(file)
    size = file.stat().st_size
    click.echo(f"{file}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES:,} bytes: use a smaller --height")


if __name__ == "__main__":
    main()
