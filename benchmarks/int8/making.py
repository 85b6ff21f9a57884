"""The parent's end of ``files.py``: images for it, and files that are made once."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from questpress import export
from questpress.export.runtime import Preprocessing, normalize
from questpress.models.build import geometry
from questpress.pipeline.data.decode import render_images
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.runs.files import digest, sha256, write_json

from benchmarks.int8.files import KINDS, versions

INPUTS = 64
"""Different images that a subject sees in turn; none of them is calibrated on."""


@dataclass(frozen=True)
class File:
    """A file to be timed, or in one sentence why there is none.

    `sha256` is of the file that is opened, and with an .xml of its .bin, too. `logits_db`: signal to noise of
    its logits against those of fp32, in dB; None for fp32 itself.
    """

    path: Path
    sha256: tuple[str, ...] = ()
    bytes: int = 0
    logits_db: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of the path only the name."""
        return {**asdict(self), "path": self.path.name}


class Images:
    """What the networks are calibrated on and timed with, drawn by a seed from the train and val roles.

    Raises:
        SystemExit: there are too few, in one sentence.
    """

    def __init__(self, data: str, count: int, seed: int, size: int) -> None:
        found = open_data(data)
        if len(found.train) < count or not found.val:
            raise SystemExit(
                f"{found.source} has {len(found.train)} images in its train role and {len(found.val)} in "
                f"its val role; calibration takes {count} of the first (--images), timing the second"
            )
        random = np.random.default_rng(seed)
        self.calibration = [found.train[i] for i in random.permutation(len(found.train))[:count]]
        self.inputs = [found.val[i] for i in random.permutation(len(found.val))[:INPUTS]]
        self.name, self.size = found.name, size

    def described(self) -> dict[str, Any]:
        """What they are, by hash; equal for equal images in an equal order."""
        return {
            "data": self.name,
            "size": self.size,
            "calibration": len(self.calibration),
            "sha256": digest([[image.key for image in part] for part in (self.calibration, self.inputs)]),
        }

    def of(self, model: str) -> tuple[np.ndarray, np.ndarray]:
        """For calibration and as inputs, float32 [n, 3, S, S] each, preprocessed as the network's own."""
        g = geometry(model, self.size)
        return self._rendered(
            Preprocessing.create(g.image_size, g.crop_fraction, g.interpolation, g.crop_mode, g.mean, g.std)
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one set of images in a process)
    def _rendered(self, how: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
        pixels = render_images([*self.calibration, *self.inputs], how).pixels.stack().numpy()
        images = normalize(pixels, how)
        return images[: len(self.calibration)], images[len(self.calibration) :]


def files_of(
    folder: Path, model: str, kinds: Sequence[str], images: Images, seed: int, left: Callable[[], bool]
) -> dict[str, File]:
    """Each kind's file of a network, made where it isn't there yet; none where no time was left for it."""
    own: dict[str, File] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(KINDS[kind].file_of or kind for kind in kinds):
        path = folder / f"{kind}{KINDS[kind].suffix}"
        made_from = {
            "kind": kind,
            "model": model,
            "seed": seed,
            "images": images.described(),
            "versions": versions([kind]),
            "fp32": own["fp32"].sha256 if own else None,
            "ours": _sources(KINDS[kind].sources) if KINDS[kind].sources else None,
        }
        file = _made(path, made_from)
        if file is None and not left():
            return {}
        own[kind] = file or _make(kind, model, path, made_from, images, seed)
    return {kind: own[KINDS[kind].file_of or kind] for kind in kinds}


def _made(path: Path, made_from: dict[str, Any]) -> File | None:
    """The file of an earlier call, where it was made from the same and is still what it was."""
    facts = read(_facts(path))
    if facts is None or facts["made_from"] != json.loads(json.dumps(made_from)):
        return None
    parts = _parts(path)
    if not all(part.exists() for part in parts) or [sha256(part) for part in parts] != facts["sha256"]:
        return None
    return File(path, tuple(facts["sha256"]), facts["bytes"], facts["logits_db"])


def _make(kind: str, model: str, path: Path, made_from: dict[str, Any], images: Images, seed: int) -> File:
    print(f"== {model}: making {KINDS[kind].title}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="questpress-int8-") as scratch:
        arrays = []
        for name, array in zip(("calibration", "inputs"), images.of(model), strict=True):
            arrays.append(Path(scratch) / f"{name}.npy")
            np.save(arrays[-1], array)
        command = [
            sys.executable, "-m", "benchmarks.int8.files", kind, str(path.with_name("fp32.onnx")),
            *map(str, arrays), str(path),
            "--network", model, "--seed", str(seed),
        ]  # fmt: skip
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        last = (told.stderr.strip().splitlines() or ["it said nothing"])[-1]
        error = f"{KINDS[kind].title} made no file of {model}: {last}"
        if kind in ("fp32", "ours"):
            raise SystemExit(error)
        return File(path, error=error)
    parts = [sha256(part) for part in _parts(path)]
    facts = {
        "made_from": made_from,
        "sha256": parts,
        "bytes": sum(part.stat().st_size for part in _parts(path)),
        "logits_db": json.loads(told.stdout)["logits_db"],
    }
    write_json(_facts(path), facts)
    return File(path, tuple(parts), facts["bytes"], facts["logits_db"])


def read(path: Path) -> dict[str, Any] | None:
    """What a JSON file says, where there is one."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _facts(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _parts(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


@functools.cache
def _sources(pattern: str) -> str:
    """A hash of our export's code: another revision makes its files anew."""
    folder = Path(next(iter(export.__path__)))
    return digest({str(f.relative_to(folder)): sha256(f) for f in sorted(folder.glob(pattern))})
