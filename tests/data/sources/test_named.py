import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from questpress.pipeline.data.dataset import SPLITS
from questpress.pipeline.data.sources import open_data, timm_datasets
from questpress.pipeline.errors import UsageError
from questpress.pipeline.runs.files import data_path, data_text, describe_namesake
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from tests.support import little


def without_checksums(monkeypatch: pytest.MonkeyPatch, kind: type[CIFAR10]) -> None:
    """Disable torchvision's MD5 checks, since the files are generated."""
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})


def fake_cifar(root: Path, kind: type[CIFAR10], classes: int, each: int = 3) -> dict[str, np.ndarray]:
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kept: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        for file, _ in files:
            data = rng.integers(0, 256, (classes * each, 3072), dtype=np.uint8)
            labels = list(range(classes)) * each
            content = {"data": data, "fine_labels" if classes > 10 else "labels": labels}
            (folder / file).write_bytes(pickle.dumps(content))
            kept[split].append(data)
    names = [f"class {n}" for n in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    return {split: np.concatenate(data) for split, data in kept.items()}


@pytest.mark.parametrize(("name", "kind", "classes"), [("cifar10", CIFAR10, 10), ("CIFAR100", CIFAR100, 100)])
def test_cifar_is_opened_by_its_timm_name(tmp_path: Path, monkeypatch, name, kind, classes) -> None:
    without_checksums(monkeypatch, kind)
    data = fake_cifar(tmp_path, kind, classes)
    images = open_data(f"torch/{name}", data_dir=tmp_path, val_fraction=0)
    assert images.classes == tuple(f"class {n}" for n in range(classes))
    assert len(images.train) == len(data["train"]) and len(images.test) == len(data["test"])
    by_name = {image.name: image for role in SPLITS for image in images.split(role)}
    first = by_name["train/0000004"]
    assert first.label == 4
    expected = data["train"][4].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(first.read(), expected)
    held_out = open_data(f"torch/{name}", data_dir=tmp_path, val_fraction=0.34)
    assert min(held_out.counts["val"]) >= 1 and len(held_out.test) == len(data["test"])


def refused(data: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        open_data(data, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and caught.value.exit_code == 2
    return sentence


def test_missing_data_set_suggests_download(tmp_path: Path) -> None:
    assert "--download" in refused("torch/cifar100", data_dir=tmp_path)
    assert "--data-dir" in refused("torch/cifar100")


def test_download_without_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("name resolution failed")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    sentence = refused("torch/cifar100", data_dir=tmp_path, download=True)
    assert "could not be downloaded" in sentence and "--data-dir" in sentence


def test_unknown_set_of_torchvision_is_refused(tmp_path: Path) -> None:
    assert "torch/cifra100 could not be opened" in refused("torch/cifra100", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("data", "package"),
    [("hfds/cifar10", "datasets"), ("WDS/shop", "webdataset"), ("tfds/mnist", "tensorflow-datasets")],
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, data: str, package: str) -> None:
    monkeypatch.setattr(timm_datasets, "find_spec", lambda _: None)
    assert f"pip install {package}" in refused(data)


def test_stream_of_unknown_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise ValueError("Dataset length is unknown, please pass `num_samples` explicitly.")

    monkeypatch.setattr("timm.data.create_dataset", create)
    monkeypatch.setattr(timm_datasets, "find_spec", lambda _: True)
    assert "or hfds/" in refused("hfids/someone/pets")


class Streamed(IterableDataset):
    """What timm's streaming readers look like."""

    def __init__(self, count: int, label: Any = None) -> None:
        self.count, self.label = count, label
        self.reader = type("Reader", (), {"class_to_idx": {"cat": 0, "dog": 1}})()

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        rng = np.random.default_rng(self.count)
        for number in range(self.count):
            pixels = rng.integers(0, 256, (6, 8), dtype=np.uint8)
            yield PillowImage.fromarray(pixels), number % 2 if self.label is None else self.label


class ReaderHfds:
    """What timm's reader of Hugging Face data sets looks like: encoded files, read at random."""

    class_to_idx = {"dog": 1, "cat": 0}  # noqa: RUF012

    def __init__(self, count: int, label: int | None) -> None:
        self.count, self.label = count, label

    def __getitem__(self, number: int) -> tuple[Any, int]:
        import io

        out = io.BytesIO()
        pixels = np.random.default_rng([self.count, number]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        PillowImage.fromarray(pixels).save(out, "PNG")
        out.seek(0)
        return out, number % 2 if self.label is None else self.label


class Random(torch.utils.data.Dataset):
    def __init__(self, count: int, label: int | None = None) -> None:
        self.reader = ReaderHfds(count, label)

    def __len__(self) -> int:
        return self.reader.count


def patch_timm(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any]) -> None:
    def create(_: str, split: str, **__: Any) -> Any:
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]

    monkeypatch.setattr("timm.data.create_dataset", create)
    monkeypatch.setattr(timm_datasets, "find_spec", lambda _: True)


def test_streamed_set_is_read_into_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_timm(monkeypatch, {"train": Streamed(40), "validation": Streamed(10)})
    images = open_data("wds/pets", data_dir=tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.counts == {"train": [18, 18], "val": [2, 2], "test": [5, 5]}
    assert images.train[0].read().shape == (6, 8, 3)


def test_streamed_set_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_timm(monkeypatch, {"train": Streamed(40)})
    monkeypatch.setattr(timm_datasets, "MAX_BYTES_IN_MEMORY", 20 * 6 * 8 * 3)
    assert "held in memory" in refused("wds/pets", data_dir=tmp_path)


def test_encoded_files_are_read_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": Random(40), "validation": Random(50), "test": Random(60, label=-1)}
    patch_timm(monkeypatch, splits)
    images = open_data("hfds/someone/pets", val_fraction=0)
    # The test split has no labels, so validation tests.
    assert images.classes == ("cat", "dog") and (len(images.train), len(images.test)) == (40, 50)
    assert isinstance(images.test[0].read(), bytes)


def test_files_of_one_name_in_two_folders_have_different_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little.photos(tmp_path)
    patch_timm(monkeypatch, {"train": ImageFolder(tmp_path)})
    images = open_data("torch/photos", data_dir=tmp_path, val_fraction=0)
    names = {image.name for split in SPLITS for image in images.split(split)}
    assert len(names) == len(images) and f"train/{little.CLASSES[0]}/000.png" in names


def test_labels_that_are_not_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_timm(monkeypatch, {"train": Streamed(10, label="cat")})
    assert "must be class numbers" in refused("wds/pets", data_dir=tmp_path)


def test_unknown_data_name_lists_the_choices(tmp_path: Path) -> None:
    sentence = refused("digit")
    assert "Did you mean digits?" in sentence and "torch/…" in sentence
    (tmp_path / "photos").mkdir()
    assert "Did you mean photos?" in refused(str(tmp_path / "phtos"))
    assert "does not exist" in refused("huggingface/cifar100")


def test_digits_and_folders_are_opened_by_their_name(tmp_path: Path) -> None:
    assert open_data("digits").name == "digits"
    assert "no class folders" in refused(str(tmp_path))


@pytest.mark.parametrize("name", ["digits", "torch/photos"])
def test_folder_with_the_name_of_a_data_set_is_written_as_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_namesake(name) is None
    little.photos(Path(name))
    for path in (f"./{name}", f"{name}/", str(tmp_path / name)):
        assert data_path(path) == Path(path) and describe_namesake(path) is None
        assert open_data(path).classes == little.CLASSES
    assert data_text(Path(name)) == f"./{name}" and data_text("photos") == "photos"
    note = f"For the folder of the same name, write ./{name}."
    assert data_path(name) is None and note in str(describe_namesake(name))
    if name == "digits":
        assert len(open_data(name).classes) == 10
    else:
        assert note in refused(name)


def test_labels_file_in_a_folder_named_torch_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "labels.csv").touch()
    assert data_path("torch/labels.csv") == Path("torch/labels.csv")


def test_same_command_twice_uses_the_digits_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    little.photos(tmp_path / "digits")
    arguments = (*little.NETWORKS, *little.SMALL, "--out", "digits/run", "--dry-run")
    result = little.check_success(little.compress(*arguments))
    assert "10 classes" in result.stderr and "./digits" not in result.stderr
    result = little.check_success(little.compress(*arguments, "--data", "digits"))
    assert "10 classes" in result.stderr and "write ./digits." in result.stderr
    result = little.compress(*arguments, "--data", "./digits")
    little.refused(result, 2, "--out digits/run is inside the data folder ./digits")
