"""Images without labels: how a folder is read, and which copies are left out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from questpress.pipeline.data.dataset import SPLITS, ImageSet
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.data.sources.unlabeled import REPEATED, add_unlabeled, check_unlabeled
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.cache import Cache

from tests.support.pictures import smooth


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 20 labeled pictures in ``data`` and, nested, six others in ``photos``."""
    root = tmp_path_factory.mktemp("root")
    for n in range(20):
        save(root / "data" / "ab"[n % 2] / f"{n}.png", smooth(n, 48, 64))
    for n in range(6):
        save(root / "photos" / ("" if n < 2 else f"deep/{n % 2}") / f"{n}.png", smooth(100 + n, 48, 64))
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> ImageSet:
    return open_data(str(root / "data"))


def test_images_at_any_depth_have_no_labels_and_do_not_change_the_splits(root: Path, data: ImageSet) -> None:
    both = add_unlabeled(data, root / "photos")
    assert sorted(image.name for image in both.unlabeled) == [
        *(f"unlabeled: {n}.png" for n in (0, 1)),
        *(f"unlabeled: deep/{n % 2}/{n}.png" for n in (2, 4, 3, 5)),
    ]
    assert not any(image.is_labeled for image in both.unlabeled)
    assert all(both.split(split) == data.split(split) for split in SPLITS)
    assert both.learned == (*data.train, *both.unlabeled) and len(both) == 20 and not both.left_out
    assert both.fingerprint == data.fingerprint
    assert data.unlabeled_fingerprint is None is not both.unlabeled_fingerprint


def test_copies_and_unreadable_files_are_left_out_and_counted(
    root: Path, data: ImageSet, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(root / "photos", photos)
    for split in SPLITS:
        image = data.split(split)[0]
        shutil.copy(root / "data" / image.name, photos / f"{split}.png")
        with PillowImage.open(root / "data" / data.split(split)[-1].name) as picture:
            picture.resize((40, 30)).save(photos / f"{split} near.jpg", quality=80)
    save(photos / "again.bmp", smooth(100, 48, 64))  # equal pixels
    (photos / "deep" / "empty.png").touch()
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "broken.png").symlink_to(tmp_path / "nowhere")
    both = add_unlabeled(data, photos, cache=Cache(tmp_path / "cache"))
    # In val and in test there is one image of each class, so the first and the last are two.
    assert both.left_out == {f"{split} images": 2 for split in SPLITS} | {REPEATED: 1}
    assert len(both.unlabeled) == 6
    assert [(file.name, file.reason, file.unreadable) for file in both.skipped] == [
        ("unlabeled: broken.png", "a broken link", False),
        ("unlabeled: deep/empty.png", "the file is empty", True),
    ]
    assert both.ignored == {".txt": 1, "hidden": 1}
    assert both.notes[0].startswith("unlabeled: images left out because they are copies: 2 of ")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere", "does not exist. Set it to a folder of images"),
        ("data/a/0.png", "is not a folder"),
        ("data", "is inside --data"),
        ("data/a", "is inside --data"),
        (".", "data is inside --unlabeled"),
    ],
)
def test_folder_that_is_missing_or_overlaps_the_data_is_refused(root: Path, folder: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_unlabeled(root / folder, str(root / "data"))
    check_unlabeled(root / "photos", str(root / "data"))
    check_unlabeled(root / "photos", "digits")


def test_folder_without_images_that_are_new_is_refused(root: Path, data: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match=r"contains no images\. Ignored files: 1 \.txt"):
        add_unlabeled(data, tmp_path)
    shutil.copy(root / "data" / data.test[0].name, tmp_path / "copy.png")
    with pytest.raises(UsageError, match="none of its 1 images is left"):
        add_unlabeled(data, tmp_path)
