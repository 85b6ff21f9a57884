"""Untrusted data: no file outside of the folder is read, names are escaped, sizes are limited."""

import hashlib
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage
from questpress.export.runtime import ImageError, decode_image
from questpress.pipeline.data.dataset import Image, hash_array
from questpress.pipeline.data.decode import Canonical, decode_images, sample_sizes
from questpress.pipeline.data.sources import open_data
from questpress.pipeline.errors import UsageError

from tests.data.sources.test_shards import png, samples, shard, split
from tests.support.pictures import folder, pixels, save

STEERING = "red\x1b]0,owned\x07\x9b2J\u202ebd\u2028x"
SHOWN = "red\\x1b]0,owned\\x07\\x9b2J\\u202ebd\\u2028x"


def refused(data: str | Path, **more: Any) -> str:
    with pytest.raises(UsageError) as error:
        open_data(str(data), val_fraction=0, **more)
    message = str(error.value)
    assert all(letter.isprintable() for letter in message)
    return message


# Labels files


def labels(root: Path, form: str, rows: list[tuple[str, str]]) -> Path:
    """Write a labels file of a format with these files and labels."""
    file = root / f"labels.{form}"
    root.mkdir(exist_ok=True)
    if form == "csv":
        lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
        file.write_text("file,labels\n" + "\n".join(lines), encoding="utf-8")
    elif form == "jsonl":
        file.write_text("\n".join(json.dumps({"file": name, "labels": [label]}) for name, label in rows))
    else:
        number = {label: i for i, label in enumerate(dict.fromkeys(label for _, label in rows))}
        content = {
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(rows)],
            "categories": [{"id": i, "name": label} for label, i in number.items()],
            "annotations": [
                {"image_id": i, "category_id": number[label]} for i, (_, label) in enumerate(rows)
            ],
        }
        file.write_text(json.dumps(content))
    return file


FORMS = pytest.mark.parametrize("form", ["csv", "jsonl", "json"])


@FORMS
@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..", "./../secret.png", "\x1b[2J/../../x"]
)
def test_labels_file_cannot_name_files_outside_of_the_folder(form: str, name: str, tmp_path: Path) -> None:
    save(tmp_path / "secret.png", 0)
    save(tmp_path / "set" / "a.png", 1)
    file = labels(tmp_path / "set", form, [("a.png", "cat"), (name, "dog")])
    assert "is outside of" in refused(file)


@FORMS
@pytest.mark.parametrize("name", ["a\x00.png", "x" * 5000, "\x1b[2J.png", "con.png/" * 500])
def test_invalid_file_names_are_missing_files(form: str, name: str, tmp_path: Path) -> None:
    save(tmp_path / "set" / "a.png", 1)
    file = labels(tmp_path / "set", form, [("a.png", "cat"), (name, "dog")])
    assert "1 of 2 images" in refused(file)


@FORMS
def test_link_out_of_the_folder_is_skipped_and_reported(form: str, tmp_path: Path) -> None:
    names = [save(tmp_path / "set" / f"{n}.png", n).name for n in range(8)]
    (tmp_path / "set" / "out.png").symlink_to(save(tmp_path / "secret.png", 99))
    rows = [(name, "cat" if n % 2 else "dog") for n, name in enumerate(names)]
    file = labels(tmp_path / "set", form, [*rows, ("out.png", "cat")])
    data = open_data(str(file), val_fraction=0)
    assert [(file.name, file.reason) for file in data.skipped] == [
        ("out.png", "a link that leads out of the data folder")
    ]
    assert len(data) == 8


@FORMS
def test_control_characters_in_labels_are_escaped(form: str, tmp_path: Path) -> None:
    names = [save(tmp_path / "set" / f"{n}.png", n).name for n in range(8)]
    file = labels(
        tmp_path / "set", form, [(name, STEERING if n % 2 else "dog") for n, name in enumerate(names)]
    )
    data = open_data(str(file), val_fraction=0)
    assert sorted(data.classes) == ["dog", SHOWN]


def test_lone_surrogate_in_json_is_escaped(tmp_path: Path) -> None:
    names = [save(tmp_path / "set" / f"{n}.png", n).name for n in range(8)]
    for form in ("jsonl", "json"):
        file = labels(
            tmp_path / "set", form, [(name, "\ud83d" if n % 2 else "dog") for n, name in enumerate(names)]
        )
        assert sorted(open_data(str(file), val_fraction=0).classes) == ["\\ud83d", "dog"]
        file.unlink()


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "1", "null", '{"images": 1}', '"x"', "1" * 5000])
def test_invalid_json_is_refused(text: str, tmp_path: Path) -> None:
    for name in ("labels.json", "labels.jsonl"):
        (tmp_path / name).write_text(text)
        refused(tmp_path / name)


@pytest.mark.parametrize(
    "annotation",
    [
        {"image_id": [1], "category_id": 1},
        {"image_id": 1, "category_id": {}},
        {"image_id": None, "category_id": 1},
        {"image_id": "\x1b" * 9000, "category_id": 1},
        [1, 1],
        "1",
    ],
)
def test_invalid_annotations_are_refused(annotation: Any, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [annotation],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert "which it does not list" in refused(tmp_path / "labels.json")


# Folders


def test_control_characters_in_class_folders_are_escaped(tmp_path: Path) -> None:
    folder(tmp_path, {STEERING: 4, "dog": 4})
    data = open_data(str(tmp_path), val_fraction=0)
    assert sorted(data.classes) == ["dog", SHOWN]
    assert all(letter.isprintable() for image in data.train for letter in image.name)


def test_file_of_a_terabyte_is_skipped_and_not_read(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 4, "dog": 4})
    with (tmp_path / "cat" / "large.png").open("wb") as file:
        file.truncate(1 << 40)  # none of it on the disk
    data = open_data(str(tmp_path), val_fraction=0)
    [skipped] = data.skipped
    assert len(data) == 8 and skipped.name == "cat/large.png" and skipped.unreadable
    assert "1,099,511,627,776 bytes, more than" in skipped.reason
    with pytest.raises(OSError, match="more than"):
        Image("large", 0, "", tmp_path / "cat" / "large.png").read()


def test_two_folders_of_one_printable_name_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"a\x1b": 3, "a\\x1b": 3, "b": 3})
    assert "Two class folders have the same printable name a\\x1b" in refused(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_named_pipe_is_ignored(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 4, "dog": 4})
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "dog" / "zero.png").symlink_to("/dev/zero")
    data = open_data(str(tmp_path), val_fraction=0)
    assert len(data) == 8 and data.ignored == {"special files": 1}
    assert [file.reason for file in data.skipped] == ["a link that leads out of the data folder"]


# Shards


def listed(root: Path, files: Any) -> Path:
    shard(root / "a.tar", samples(0, 12))
    train = split("train", ["a.tar"], [12]) | {"filenames": files}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    return root


@pytest.mark.parametrize("name", ["../out.tar", "{here}/out.tar", "link.tar", "a\x00.tar", "x/../../out.tar"])
def test_shard_list_cannot_name_files_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    shard(tmp_path / "out.tar", samples(0, 12))
    (tmp_path / "set" / "link.tar").symlink_to("../out.tar")
    root = listed(tmp_path / "set", ["a.tar", name.format(here=tmp_path)])
    assert "is outside of" in refused("wds/set", data_dir=root)


@pytest.mark.parametrize("files", [{"a.tar": 1}, 3, [3], None])
def test_invalid_shard_list_is_refused(files: Any, tmp_path: Path) -> None:
    assert "must list file names" in refused("wds/set", data_dir=listed(tmp_path, files))


def test_members_are_never_extracted(tmp_path: Path) -> None:
    members = {f"../../{n}.png": png(n) for n in range(12)} | {
        f"../../{n}.cls": b"%d" % (n % 2) for n in range(12)
    }
    members = dict(sorted(members.items()))
    (tmp_path / "a" / "b").mkdir(parents=True)
    shard(tmp_path / "a" / "b" / "train.tar", members | {"/etc/evil.png": png(99), "/etc/evil.cls": b"1"})
    before = sorted(tmp_path.rglob("*"))
    data = open_data("wds/set", data_dir=tmp_path / "a" / "b", val_fraction=0)
    assert len(data) == 13 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_shard_are_ignored(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in samples(0, 12).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("x/evil.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert len(open_data("wds/set", data_dir=tmp_path, val_fraction=0)) == 12


@pytest.mark.parametrize("label", [b"cat", b"1000000", b"9" * 4000, b"x" * (1 << 21), b"[" * 100_000])
def test_label_that_is_no_number_or_beyond_the_limits_is_refused(label: bytes, tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", samples(0, 12) | {"z.png": png(50), "z.cls": label})
    assert "The label of train/train.tar/z " in refused("wds/set", data_dir=tmp_path)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, -1])
def test_shard_with_a_false_size_takes_no_memory(size: int, tmp_path: Path) -> None:
    content = bytearray(shard(tmp_path / "train.tar", {"0.png": png(0)}).read_bytes())
    content[124:136] = b"\x80" + size.to_bytes(11, "big") if size > 0 else b"\xff" * 12
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "train.tar").write_bytes(content)
    tracemalloc.start()
    refused("wds/set", data_dir=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# Images


def bomb(side: int) -> bytes:
    """A PNG of side × side gray pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(side + 1)) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def icon(picture: bytes) -> bytes:
    """Return a Windows icon whose header specifies 16 × 16 pixels."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + picture


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    content = bomb(10_000)
    return {"bomb.png": content, "icon.ico": icon(content), "icon.png": icon(content)}


def test_decompression_bombs_are_refused_in_all_formats(bombs: dict[str, bytes]) -> None:
    for name, content in bombs.items():
        assert len(content) < 300_000, name
        with pytest.raises(ImageError, match="exceed the limit of 89478485"):
            decode_image(content)
    with pytest.raises(ImageError, match=r"192×192 pixels"):
        decode_image(icon(bomb(192)), max_pixels=10_000)


def test_decompression_bombs_are_skipped_and_reported(bombs: dict[str, bytes]) -> None:
    images = [Image("ok", 0, hash_array(pixels(0)), pixels(0))]
    for name, content in bombs.items():
        images.append(Image(name, 0, hashlib.sha256(content).hexdigest(), content))
    decoded = decode_images(images, Canonical("short_side", 8))
    assert [image.name for image in decoded.images] == ["ok"]
    assert all("exceed the limit" in file.reason and file.unreadable for file in decoded.skipped)
    assert len(sample_sizes(images)) >= 1


def false_sizes() -> dict[str, bytes]:
    out = io.BytesIO()
    PillowImage.fromarray(pixels(0)).save(out, "PNG")
    whole = bytearray(out.getvalue())
    larger = bytes(whole[:16]) + struct.pack(">II", 4000, 4000) + bytes(whole[24:29])
    larger += struct.pack(">I", zlib.crc32(larger[12:29])) + bytes(whole[33:])
    out = io.BytesIO()
    PillowImage.fromarray(pixels(0)).save(out, "JPEG")
    jpeg = bytearray(out.getvalue())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_535, 65_535)
    out = io.BytesIO()
    PillowImage.fromarray(pixels(0)).convert("P").save(out, "GIF")
    gif = bytearray(out.getvalue())
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    return {"more rows than there are": larger, "a huge frame": bytes(jpeg), "a huge screen": bytes(gif)}


@pytest.mark.parametrize("kind", false_sizes())
def test_images_with_a_false_size_are_refused(kind: str) -> None:
    with pytest.raises(ImageError):
        decode_image(false_sizes()[kind])


def test_tiff_with_missing_strips_is_refused() -> None:
    out = io.BytesIO()
    PillowImage.new("I", (16, 16)).save(out, "TIFF")
    whole = bytearray(out.getvalue())
    height = whole.index(struct.pack("<HHI", 257, 4, 1)) + 8
    assert decode_image(bytes(whole)).shape == (16, 16, 3)
    whole[height : height + 4] = struct.pack("<I", 4_194_320)
    with pytest.raises(ImageError, match="parts of the image are missing"):
        decode_image(bytes(whole))


def test_float_image_is_decoded_in_limited_memory() -> None:
    out = io.BytesIO()
    PillowImage.new("F", (2000, 2000), 0.5).save(out, "TIFF")
    tracemalloc.start()
    pixels = decode_image(out.getvalue())
    assert tracemalloc.get_traced_memory()[1] < 2000 * 2000 * 24
    tracemalloc.stop()
    assert pixels.shape == (2000, 2000, 3) and pixels.min() == pixels.max() == 128
