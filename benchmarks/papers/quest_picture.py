"""How QuEST sees a photo, in one picture: docs/quest.png.

    python -m benchmarks.papers.quest_picture runs/shop --image 3 --out docs/quest.png

From a finished QuEST run: a val image with its positions, the teacher's nearest word at each of them, and
for one position the likeliest words of the teacher (p_T) and what the trained student predicts (p_S), each
word shown as the patches of other val images that are nearest to it.
"""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from questpress.pipeline.api.options import read_options
from questpress.pipeline.api.resolve import resolve
from questpress.pipeline.data.training_data import TrainingData
from questpress.pipeline.methods.quest.quest import Quest, WordPrediction
from questpress.pipeline.methods.quest.vocabulary import positions
from questpress.pipeline.runs.cache import Cache
from questpress.pipeline.runs.console import Display
from questpress.pipeline.runs.device import Engine, threads
from questpress.pipeline.runs.folder import RunFolder
from questpress.pipeline.tasks import task_of
from questpress.pipeline.training.context import RunContext
from questpress.pipeline.training.student import build_methods, load_heads, student_task
from questpress.pipeline.training.weights import load_network, load_teacher
from torch import Tensor

PHOTO, ROW, PATCH, WORDS, PATCHES = 320, 52, 48, 6, 4
INK, FAINT, PAPER = "#1b1f24", "#6b7280", "#ffffff"
TEACHER, STUDENT = "#1f6feb", "#d2691e"


@dataclass
class Outputs:
    """Outputs of a run's networks for the val role: pixels uint8 [n,3,S,S], and for each of the h·w positions
    of each image p_T and p_S [n,h·w,K] and the squared distances to the words [n,h·w,K].
    """

    pixels: Tensor
    grid: tuple[int, int]
    p_t: Tensor
    p_s: Tensor
    distances: Tensor


@torch.no_grad()
def compute_outputs(run: Path, cache: Path | None) -> Outputs:
    folder = RunFolder(run, writes=False)
    folder.open(fresh=False)
    chosen, images = resolve(read_options({"config": str(run / "config.yaml"), "out": run, "cache": cache}))
    with Display(quiet=True).stage("picture") as stage:
        data = TrainingData(chosen, images, Cache(cache), "cpu", lambda *_: None)
        context = RunContext(
            options=chosen,
            set_options=frozenset(),
            task=task_of(images),
            dataset_name=images.name,
            num_classes=len(images.classes),
            folder=folder,
            cache=data.cache,
            display=Display(quiet=True),
            progress=stage,
            device="cpu",
        )
        engine, round_ = Engine("cpu", threads(), "fp32"), context.round
        built = build_methods(chosen, round_, run)
        task, _ = student_task(context, data, load_network(run, round_.student), engine, built)
        load_heads(task, folder.path / "student.heads.safetensors")
        task.eval()
        method = task.student.methods["quest"]
        assert isinstance(method, Quest)
        term = method.terms[0]
        assert isinstance(term, WordPrediction)
        teacher = load_teacher(run, round_.teachers[term.teacher], engine)
        for_teacher, for_student = (
            data.rendered("val", spec)[0].permute(0, 3, 1, 2)
            for spec in (round_.teachers[term.teacher], round_.student)
        )
        p_t, p_s, distances = [], [], []
        for of_teacher, of_student in zip(for_teacher.split(64), for_student.split(64), strict=True):
            f_t = positions(
                teacher(of_teacher, frozenset({term.teacher_level}))[term.teacher_level], term.grid
            )
            squared = torch.cdist(f_t.float(), term.words).square()
            f_s = task.student.readouts(task.student.normalize(of_student), frozenset({term.student_level}))[
                term.student_level
            ]
            cosine = F.normalize(positions(f_s, term.grid).float(), dim=1) @ F.normalize(term.weight, dim=1).T
            n, places = len(of_teacher), term.grid[0] * term.grid[1]
            distances.append(squared.view(n, places, -1))
            p_t.append((-squared / term.tau).softmax(1).view(n, places, -1))
            p_s.append((term.gamma * cosine).softmax(1).view(n, places, -1))
    return Outputs(for_student, term.grid, torch.cat(p_t), torch.cat(p_s), torch.cat(distances))


def photo(pixels: Tensor, side: int) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((side, side), Image.Resampling.LANCZOS)


def word_color(word: int) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb((word * 0.618034) % 1, 0.55, 0.95)
    return int(255 * r), int(255 * g), int(255 * b)


def cell(outputs: Outputs, place: int, side: int) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a position in a square picture."""
    h, w = outputs.grid
    y, x = divmod(place, w)
    return x * side / w, y * side / h, (x + 1) * side / w, (y + 1) * side / h


def patches(outputs: Outputs, word: int, without: int) -> list[Image.Image]:
    """Crop the nearest positions of different images, each with half a cell's surround on every side."""
    crops = []
    best, places = outputs.distances[:, :, word].min(1)
    for image in best.argsort().tolist():
        if image != without and len(crops) < PATCHES:
            side = 4 * PHOTO
            left, top, right, _ = cell(outputs, int(places[image]), side)
            around = (right - left) / 2
            # At the picture's edge the surround lies on one side.
            x, y = (min(max(edge - around, 0), side - 4 * around) for edge in (left, top))
            box = tuple(round(edge) for edge in (x, y, x + 4 * around, y + 4 * around))
            crops.append(photo(outputs.pixels[image], side).crop(box).resize((PATCH, PATCH)))
    return crops


def draw(outputs: Outputs, image: int, place: int) -> Image.Image:
    words = outputs.p_t[image, place].topk(WORDS).indices.tolist()
    width, height = 3 * PHOTO + 220, max(PHOTO + 120, WORDS * ROW + 130)
    canvas = Image.new("RGB", (width, height), PAPER)
    pen, text, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    marked = cell(outputs, place, PHOTO)
    base = photo(outputs.pixels[image], PHOTO)

    def frame(left: int, title: str, about: Sequence[str]) -> None:
        pen.text((left, 12), title, INK, text)
        for n, line in enumerate(about):
            pen.text((left, 36 + PHOTO + 10 + 16 * n), line, FAINT, small)

    h, w = outputs.grid
    frame(16, "a photo", [f"{h} by {w} positions of the last map;", "one of them marked"])
    canvas.paste(base, (16, 36))
    frame(32 + PHOTO, "the teacher’s words", ["the nearest word at each position,", "by number and color"])
    canvas.paste(base.convert("L").convert("RGB"), (32 + PHOTO, 36))
    for n in range(h * w):
        word = int(outputs.p_t[image, n].argmax())
        box = cell(outputs, n, PHOTO)
        tint = Image.new("RGB", (round(box[2] - box[0]), round(box[3] - box[1])), word_color(word))
        at = (round(32 + PHOTO + box[0]), round(36 + box[1]))
        under = canvas.crop((*at, at[0] + tint.width, at[1] + tint.height))
        canvas.paste(Image.blend(under, tint, 0.55), at)
        pen.text((at[0] + 5, at[1] + 4), str(word), INK, small)
    for left in (16, 32 + PHOTO):
        pen.rectangle(
            (left + marked[0], 36 + marked[1], left + marked[2], 36 + marked[3]), outline="#d1242f", width=3
        )
    bars(canvas, pen, outputs, image, place, words, 48 + 2 * PHOTO)
    return canvas


def bars(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    outputs: Outputs,
    image: int,
    place: int,
    words: Sequence[int],
    left: int,
) -> None:
    """Draw p_T and p_S of the marked position for each word, with the patches nearest to it."""
    text, small = ImageFont.load_default(15), ImageFont.load_default(12)
    pen.text((left, 12), "p_T and p_S at the marked position", INK, text)
    at, room = left + 60 + PATCHES * (PATCH + 4), 190
    most = float(max(outputs.p_t[image, place].max(), outputs.p_s[image, place].max()))
    for n, word in enumerate(words):
        top = 36 + n * ROW
        pen.rectangle((left, top, left + 48, top + PATCH), fill=word_color(word))
        pen.text((left + 6, top + 16), str(word), INK, small)
        for i, patch in enumerate(patches(outputs, word, image)):
            canvas.paste(patch, (left + 54 + i * (PATCH + 4), top))
        for i, (p, ink) in enumerate(((outputs.p_t, TEACHER), (outputs.p_s, STUDENT))):
            fraction = float(p[image, place, word])
            y = top + 4 + 21 * i
            pen.rectangle((at, y, at + max(1.0, room * fraction / most), y + 17), fill=ink)
            pen.text((at + room * fraction / most + 5, y + 1), f"{100 * fraction:.0f} %", INK, small)
    y = 36 + len(words) * ROW + 10
    for line, ink in (
        ("p_T, the teacher: soft assignment to the nearest words", TEACHER),
        ("p_S, the student: predicted from its own, smaller map", STUDENT),
    ):
        pen.rectangle((left, y + 2, left + 12, y + 14), fill=ink)
        pen.text((left + 18, y), line, INK, small)
        y += 18
    pen.text((left, y), "next to each word: the nearest patches of other photos", FAINT, small)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--image", type=int, help="number of the val image [default: of the best position]")
    parser.add_argument("--place", type=int, help="number of the position [default: where both agree most]")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/quest.png"))
    options = parser.parse_args()
    outputs = compute_outputs(options.run, options.cache)
    agree = torch.minimum(outputs.p_t, outputs.p_s).sum(2)  # what the two distributions have in common
    image = int(agree.mean(1).argmax()) if options.image is None else options.image
    entropy = -(outputs.p_t * outputs.p_t.clamp_min(1e-9).log()).sum(2)
    # Of the agreed positions one where the teacher is undecided: a single bar shows nothing.
    place = int((agree[image] * entropy[image]).argmax()) if options.place is None else options.place
    draw(outputs, image, place).save(options.out, optimize=True)
    print(f"{options.out}: image {image}, position {place} of {outputs.grid[0]} × {outputs.grid[1]}")


if __name__ == "__main__":
    main()
