"""The pages of validate and compare in a real browser, where there is one."""

import re
from pathlib import Path

import pytest
from questpress.export.latency.results import Speedup
from questpress.pipeline.api.compare import groups
from questpress.pipeline.evaluation.results import (
    ClassMeasure,
    ComparedFile,
    ComparedRun,
    Comparison,
    Network,
    Validation,
)
from questpress.pipeline.report.pages import comparison, validation
from questpress.pipeline.runs.results import Example
from questpress.pipeline.runs.scores import Calibration, Proportion, ReliabilityBin

from tests.report.test_browser import BROWSER, NAMES, opened
from tests.support import reports

WIDTHS = (390, 1280)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: looked for {', '.join(NAMES)}")


def calibration() -> Calibration:
    edges = [100 * i / 15 for i in range(16)]
    bins = [ReliabilityBin(low=edges[0], high=edges[1], n=0)] + [
        ReliabilityBin(low=edges[i], high=edges[i + 1], n=i, confidence=edges[i] + 3, accuracy=6 * i)
        for i in range(1, 15)
    ]
    return Calibration(
        ece=4.1, ece_low=2, ece_high=6, confidence=84, accuracy=80, gap_low=1, gap_high=7, entropy=0.5,
        nll=0.61, n=105, bins=bins,
    )  # fmt: skip


def validated() -> str:
    """Long names everywhere, and more files than fit."""
    names = [f"{'long' * 9} name {i}" for i in range(12)]

    def network(name: str, role: str, precision: str | None) -> Network:
        return Network.model_validate(
            {
                "name": name,
                "role": role,
                "source": "runs/" + "shop" * 20,
                "file": "student.onnx",
                "bytes": 2_500_000,
                "sha256": "9c2f" * 16,
                "precision": precision,
                "image_size": 96,
                "classes": names,
                "score": reports.accuracy(80, 105),
                "calibration": calibration(),
                "per_class": [
                    ClassMeasure(label=one, n=9, predicted=8, correct=7, recall=Proportion.from_counts(7, 9))
                    for one in names
                ],
                "confusion": [[9 if i == k else i % 3 for k in range(12)] for i in range(12)],
                "teacher": None if role == "teacher" else "teacher",
                "agreement": None if role == "teacher" else Proportion.from_counts(90, 105),
                "mistakes": 25,
            }
        )

    networks = [network(f"shop{'x' * 30} {kind}", "student", kind) for kind in ("int8", "fp32")]
    networks.append(network("teacher", "teacher", None))
    found = Validation(
        title=f"{'shop' * 20} on photos",
        command="compress validate " + "x" * 200,
        data="photos",
        source="photos",
        role="all",
        n=105,
        images="0" * 64,
        per_class=dict.fromkeys(names, 9),
        networks=networks,
        examples=[
            Example(name=f"{'a' * 60}/{i}.jpg", label=names[i], teacher=names[i], teacher_probability=0.5,
                    student=names[(i + 1) % 12], student_probability=0.9, png=reports.png(i))
            for i in range(12)
        ],
        skipped=[("broken" * 30, "the file is empty")],
        warnings=["A warning."],
        notes=["A note."],
        environment={"cpu": "AMD EPYC 9555", "onnxruntime": "1.27.0", "threads": "2"},
    )  # fmt: skip
    return validation.render_validation(found)["validation.html"]


def compared() -> str:
    """Two groups, many runs, long names."""

    def file(kind: str, correct: int, p50: float, size: int) -> ComparedFile:
        return ComparedFile.model_validate(
            {
                "kind": kind,
                "network": "mobilenetv2_100",
                "bytes": size,
                "score": reports.accuracy(correct, 372),
                "ece": 3.0,
                "p50": p50,
                "p50_low": p50 * 0.99,
                "p50_high": p50 * 1.01,
                "speedup": Speedup(
                    subject="student_int8", over="teacher", threads=1, ratio=8, low=7.9, high=8.1
                ),
            }
        )

    runs = [
        ComparedRun(
            name=f"{'run' * 12}-{i}",
            source="runs/" + "long" * 30,
            method="quest+kd+mimic",
            teacher="5 × cifar_resnet56",
            student="mobilenetv2_100",
            image_size=96,
            parameters=2_236_682,
            int8=file("int8", 300 + 3 * i, 0.6 + 0.01 * i, 2_500_000),
            fp32=file("fp32", 301 + 3 * i, 1.2 + 0.01 * i, 8_900_000),
            teacher_file=file("teacher", 350, 12.4, 85_000_000),
            training_seconds=3000,
            seed=i,
            data="photos" if i < 9 else "other",
            fingerprint="f" if i < 9 else "g",
            machine="AMD EPYC 9555",
        )
        for i in range(11)
    ]
    found = Comparison(
        title="11 runs on photos, other",
        command="compress compare " + "x" * 200,
        threads=1,
        runs=runs,
        groups=groups(runs, {}),
        warnings=["A warning."],
        notes=["A note."],
    )
    return comparison.render_comparison(found)["comparison.html"]


PAGES = {"validation": validated, "comparison": compared}


@pytest.mark.parametrize("name", PAGES)
def test_browser_has_nothing_to_complain_about_and_nothing_is_from_outside(name: str, tmp_path: Path) -> None:
    page = PAGES[name]()
    assert opened(page, tmp_path, 1280) == []
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:|#)[a-z]*:?//", page)
    assert "<script" not in page and "default-src 'none'" in page


def test_pages_fit_their_windows_and_every_picture_is_seen(tmp_path: Path) -> None:
    # The pages themselves allow no script; the copies that are measured do, in a frame for each width.
    measure = """<script>
    const pictures = [...document.querySelectorAll('img, svg[role=img]')];
    const seen = pictures.filter(one => one.getBoundingClientRect().width > 20);
    const whole = [...document.images].every(one => one.naturalWidth > 0);
    const widest = document.documentElement.scrollWidth;
    addEventListener('load', () => console.log(
        `measured ${location.hash} ${widest} of ${innerWidth}, ${seen.length} of ${pictures.length}, ${whole}`
    ));
    </script>"""
    frames = ""
    for name, made in PAGES.items():
        page = re.sub(r"<meta http-equiv=.*?>", "", made()).replace("<details", "<details open")
        page = page.replace("</body>", f"{measure}</body>")
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
        for width in WIDTHS:
            frames += f'<iframe src="{name}.html#{name}" width="{width}" height="900"></iframe>'
    told = "\n".join(opened(frames, tmp_path, 1400))
    found = re.findall(r"measured #(\w+) (\d+) of (\d+), (\d+) of (\d+), (\w+)", told)
    assert sorted((name, int(window)) for name, _, window, *_ in found) == [
        (name, width) for name in sorted(PAGES) for width in WIDTHS
    ], told
    for name, widest, window, seen, pictures, whole in found:
        assert int(widest) <= int(window) and whole == "true", (name, window)
        # The comparison's picture is there for two widths, of which one is shown.
        shown = int(pictures) // 2 if name == "comparison" else int(pictures)
        assert int(seen) == shown > 0, (name, window)
