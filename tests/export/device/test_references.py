"""The programs of docs/preprocessing.md return the runtime's pixels, and the manifest describes the steps."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questpress.export.description import describe_steps
from questpress.export.device.sample_images import draw_images
from questpress.export.runtime import Preprocessing, decode_image, height_width, render

PAGE = (Path(__file__).parents[3] / "docs" / "preprocessing.md").read_text(encoding="utf-8")
MAIN_JS = """
const fs = require("fs");
for (const { file, height, width, p } of JSON.parse(fs.readFileSync("cases.json")))
  fs.writeFileSync(file + ".out", render(fs.readFileSync(file), height, width, p));
"""
MAIN_CPP = """
#include <fstream>

int main() {
  std::ifstream cases("cases.txt");
  std::string file;
  Sides image;
  Preprocessing p;
  while (cases >> file >> image[0] >> image[1] >> p.size[0] >> p.size[1] >> p.resize[0] >> p.resize[1] >>
         p.crop_mode >> p.interpolation >> p.mean[0] >> p.mean[1] >> p.mean[2]) {
    Pixels pixels(size_t(image[0]) * image[1] * 3);
    std::ifstream(file, std::ios::binary).read(reinterpret_cast<char*>(pixels.data()), pixels.size());
    const Pixels input = render(pixels, image, p);
    const char* bytes = reinterpret_cast<const char*>(input.data());
    std::ofstream(file + ".out", std::ios::binary).write(bytes, input.size());
  }
}
"""


def images() -> Iterator[np.ndarray]:
    for shape in ((7, 5), (61, 90), (300, 33), (120, 121)):
        yield np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    yield np.indices((50, 70)).sum(axis=0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255
    yield from map(decode_image, draw_images(200))  # PNG, PNG with transparency, JPEG on its side


def geometries() -> Iterator[Preprocessing]:
    sizes = ((32, 0.875), ((24, 40), 0.95), (33, 1.0), ((20, 31), 1.25))
    for mode, filter, (size, fraction) in product(
        ("center", "squash", "border"), ("bilinear", "bicubic", "lanczos"), sizes
    ):
        yield Preprocessing.create(size, fraction, filter, mode)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A folder with images and their preprocessing, and the pixels that the runtime renders."""
    folder, expected, described, lines = tmp_path_factory.mktemp("cases"), [], [], []
    for number, p in enumerate(geometries()):
        pixels = list(images())[number % 8]
        file, (height, width) = f"{number}.rgb", pixels.shape[:2]
        (folder / file).write_bytes(pixels.tobytes())
        described.append({"file": file, "height": height, "width": width, "p": p.to_dict()})
        sides = (*height_width(p.size), *height_width(p.resize))
        lines.append(
            f"{file} {height} {width} {' '.join(map(str, (*sides, p.crop_mode, p.interpolation, *p.mean)))}"
        )
        expected.append(render(pixels, p))
    (folder / "cases.json").write_text(json.dumps(described))
    (folder / "cases.txt").write_text("\n".join(lines))
    return folder, expected


def code(language: str) -> str:
    [block] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return block


def check_outputs(folder: Path, expected: list[np.ndarray]) -> None:
    for number, pixels in enumerate(expected):
        file = folder / f"{number}.rgb.out"
        np.testing.assert_array_equal(
            np.frombuffer(file.read_bytes(), np.uint8).reshape(pixels.shape), pixels
        )
        file.unlink()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_javascript_of_the_page_renders_the_runtimes_pixels(cases: tuple[Path, list[np.ndarray]]) -> None:
    (cases[0] / "render.js").write_text(code("js") + MAIN_JS)
    subprocess.run(["node", "render.js"], cwd=cases[0], check=True, timeout=60)
    check_outputs(*cases)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp_of_the_page_renders_the_runtimes_pixels(cases: tuple[Path, list[np.ndarray]]) -> None:
    (cases[0] / "render.cpp").write_text(code("cpp") + MAIN_CPP)
    command = "g++ -std=c++17 -Wall -Wextra -Werror render.cpp -o render"
    subprocess.run(command.split(), cwd=cases[0], check=True, timeout=120)
    subprocess.run(["./render"], cwd=cases[0], check=True, timeout=60)
    check_outputs(*cases)


@pytest.mark.parametrize(
    ("p", "changes"),
    [
        (Preprocessing.create(32), {"fit": "cover", "rounding": "longer side down", "height": 36}),
        (Preprocessing.create((24, 40)), {"fit": "cover", "rounding": "half to even", "width": 45}),
        (Preprocessing.create(32, 1.0, "bilinear", "border"), {"fit": "contain", "support": 1}),
        (Preprocessing.create(32, 1.0, "bicubic", "squash"), {"fit": "fill", "support": 2, "a": -0.5}),
    ],
)  # fmt: skip
def test_steps_have_all_parameters(p: Preprocessing, changes: dict[str, Any]) -> None:
    decode, resize, crop, normalize = describe_steps(p, takes_pixels=False)
    assert decode["orientation"] == "EXIF" and decode["gray_bits"] == 16
    assert changes.items() <= resize.items()
    assert (crop["height"], crop["width"]) == height_width(p.size)
    assert crop["padding"] == ([124, 116, 104] if p.crop_mode == "border" else [0, 0, 0])
    assert normalize["mean"] == list(p.mean) and normalize["std"] == list(p.std)
    assert describe_steps(p, takes_pixels=True) == [decode, resize, crop]
