"""Every odd kind of image file, built with Pillow and compared with the colors it should show."""

import io
import os
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile
from questpress.export import runtime
from questpress.export.runtime import ImageError, decode_image

RED, BLUE = (200, 30, 40), (20, 60, 220)


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    """Red above, blue below, with a gradient of green to the right: no symmetry."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2], pixels[height // 2 :] = RED, BLUE
    pixels[:, :, 1] = np.linspace(0, 250, width).astype(np.uint8)
    return pixels


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG built chunk by chunk, for the kinds that Pillow reads but doesn't write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = b"".join(chunk(name, content) for name, content in extra)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + body
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_path_a_string_and_bytes_read_alike(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(picture()), "PNG")
    file = tmp_path / "a.png"
    file.write_bytes(content)
    for source in (file, str(file), content):
        decoded = decode_image(source)
        assert decoded.dtype == np.uint8 and decoded.flags.writeable
        np.testing.assert_array_equal(decoded, picture())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA"])
def test_lossless_formats_come_back_pixel_for_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(picture()), kind, **options)), picture()
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_turns_the_picture_upright(orientation: int, kind: str) -> None:
    upright = picture(16, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    difference = decode_image(content).astype(int) - upright
    assert abs(difference).max() <= (40 if kind == "JPEG" else 0)  # JPEG blurs the edge of red and blue
    assert abs(difference).mean() < 3


def test_broken_exif_leaves_the_pixels_readable() -> None:
    content = encoded(Image.fromarray(picture()), "PNG", exif=b"Exif\x00\x00not exif at all")
    np.testing.assert_array_equal(decode_image(content), picture())


def test_gray_bilevel_and_gray_with_alpha() -> None:
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(gray), "PNG")), gray[..., None].repeat(3, 2)
    )
    bilevel = Image.fromarray(((gray > 100) * 255).astype(np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(bilevel, "PNG"))[..., 0], (gray > 100) * 255)
    alpha = np.zeros_like(gray)
    alpha[:, 4:] = 255
    shown = decode_image(encoded(Image.fromarray(np.dstack([gray, alpha]), "LA"), "PNG"))
    np.testing.assert_array_equal(shown[:, :4], 255)
    np.testing.assert_array_equal(shown[:, 4:, 1], gray[:, 4:])


def test_transparency_is_laid_on_white() -> None:
    alpha = np.full((6, 8), 128, np.uint8)
    alpha[0], alpha[1] = 0, 255
    shown = decode_image(encoded(Image.fromarray(np.dstack([picture(), alpha])), "PNG"))
    expected = picture() * (alpha[..., None] / 255.0) + 255 * (1 - alpha[..., None] / 255.0)
    assert abs(shown - expected).max() <= 1
    np.testing.assert_array_equal(shown[0], 255)
    np.testing.assert_array_equal(shown[1], picture()[1])


def test_palette_images_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, 0, 255, 0])
    image.putdata([0, 1, 2])
    assert decode_image(encoded(image, "PNG")).tolist() == [[list(RED), list(BLUE), [0, 255, 0]]]
    shown = decode_image(encoded(image, "PNG", transparency=1))
    assert shown.tolist() == [[list(RED), [255, 255, 255], [0, 255, 0]]]
    half = decode_image(encoded(image, "PNG", transparency=bytes([255, 0, 128])))
    assert half[0, :2].tolist() == [list(RED), [255, 255, 255]]
    assert abs(half[0, 2].astype(int) - [127, 255, 127]).max() <= 1
    assert decode_image(encoded(image, "GIF", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_color_key_makes_rgb_and_gray_transparent() -> None:
    content = encoded(Image.fromarray(np.array([[RED, BLUE]], np.uint8)), "PNG", transparency=BLUE)
    assert decode_image(content).tolist() == [[list(RED), [255, 255, 255]]]
    gray = encoded(Image.fromarray(np.array([[7, 9]], np.uint8)), "PNG", transparency=9)
    assert decode_image(gray)[0, :, 0].tolist() == [7, 255]


def test_cmyk_is_read_with_adobes_inversion() -> None:
    for color, cmyk in (((255, 0, 0), (0, 255, 255, 0)), ((0, 0, 0), (0, 0, 0, 255))):
        image = Image.new("CMYK", (16, 16), cmyk)
        for kind in ("JPEG", "TIFF"):
            shown = decode_image(encoded(image, kind))
            assert abs(shown.astype(int) - color).max() <= 3, kind


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    values = (np.arange(48, dtype=np.uint16) * 1365).reshape(6, 8)
    expected = np.round(values / 257)
    image = Image.fromarray(values)
    big_endian = Image.frombytes("I;16B", (8, 6), values.astype(">u2").tobytes())
    pgm = b"P5\n8 6\n65535\n" + values.astype(">u2").tobytes()
    for content in (encoded(image, "PNG"), encoded(image, "TIFF"), encoded(big_endian, "TIFF"), pgm):
        shown = decode_image(content)
        assert abs(shown[..., 0] - expected).max() <= 1
        np.testing.assert_array_equal(shown[..., 0], shown[..., 2])


def test_sixteen_bit_color_and_color_keys() -> None:
    values = (np.arange(18, dtype=np.uint16) * 3800).reshape(2, 3, 3)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    assert abs(decode_image(png(3, 2, 16, 2, rows)) - values / 257).max() <= 1
    key = struct.pack(">HHH", *values[0, 1].tolist())
    assert decode_image(png(3, 2, 16, 2, rows, (b"tRNS", key)))[0, 1].tolist() == [255, 255, 255]
    gray = np.array([[1000, 60000]], np.uint16)
    content = png(2, 1, 16, 0, b"\x00" + gray.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", 1000)))
    assert decode_image(content)[0, :, 0].tolist() == [255, 60000 >> 8]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([float("nan"), 1.0, 0.0], [0, 255, 0]),
    ],
)
def test_float_tiff_is_scaled_by_the_range_it_uses(values: list[float], shown: list[int]) -> None:
    content = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode_image(content)[0, :, 1].tolist() == shown


def test_thirty_two_bit_integers_are_scaled() -> None:
    content = encoded(Image.fromarray(np.array([[0, 25700, 65535]], np.int32)), "TIFF")
    assert decode_image(content)[0, :, 0].tolist() == [0, 100, 255]


def tiff(bits: int, photometric: int, samples: bytes, width: int) -> bytes:
    """One row of unsigned gray, in the bit depths that Pillow reads but doesn't write."""
    shorts = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric)]
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in shorts]
    start = 8 + 2 + 12 * (len(shorts) + 3) + 4
    entries += [
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((273, start), (278, 1), (279, len(samples)))
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0) + samples


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (tiff(12, 1, bytes([0xFF, 0xF8, 0x00]), 2), [255, 128]),
        (tiff(16, 0, struct.pack("<HH", 0, 65535), 2), [255, 0]),
        (tiff(8, 0, bytes([0, 255]), 2), [255, 0]),
        (tiff(32, 1, struct.pack("<II", 0, 2**32 - 1), 2), [0, 255]),
    ],
)
def test_scanners_bit_depths_and_inverted_gray_are_read(content: bytes, shown: list[int]) -> None:
    assert decode_image(content)[0, :, 1].tolist() == shown


def test_lab_colors_are_converted() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (4, 4), RED), srgb, lab, outputMode="LAB")
    assert abs(decode_image(encoded(image, "TIFF")).astype(int) - RED).max() <= 3


def test_first_frame_of_an_animation_is_read() -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        content = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert abs(decode_image(content).astype(int) - RED).max() <= 3, kind


def test_one_pixel_is_an_image() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1), RED), "PNG")).tolist() == [[list(RED)]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_file_is_an_error_that_names_it(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    file = tmp_path / "short.img"
    for keep in (0.9, 0.5, 0.1):
        file.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ImageError, match=r"short\.img"):
            decode_image(file)


def test_non_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image, whatever its name is\n" * 20)
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("empty.jpg", "empty"),
        ("text.jpg", "not an image"),
        ("folder.jpg", "not a file"),
        ("missing.jpg", "No such file"),
    ]:
        with pytest.raises(ImageError, match=reason) as raised:
            decode_image(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ImageError, match="it is empty"):
        decode_image(b"")


def test_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a file"):
        decode_image(tmp_path / "pipe.jpg")


def test_name_that_is_not_utf8_is_printable(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    try:
        path.write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ImageError) as raised:
        decode_image(path)
    assert r"caf\xe9.png" in str(raised.value)
    str(raised.value).encode("utf-8")


def test_decompression_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for side in (10_000, 40_000):  # Pillow itself warns of the first and refuses the second
        header = png(side, side, 8, 2, b"\x00" * 100)
        with pytest.raises(ImageError, match="pixels"):
            decode_image(header)
    small = encoded(Image.fromarray(picture()), "PNG")
    with pytest.raises(ImageError, match=r"8×6 pixels exceed the limit of 47"):
        decode_image(small, max_pixels=47)


def test_pillows_warnings_stay_inside() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    content = encoded(image, "PNG", transparency=bytes([255, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(content)
        with pytest.raises(ImageError):
            decode_image(png(10_000, 10_000, 8, 2, b""))
        with pytest.raises(UserWarning, match="ours"):  # and others' warnings still get out
            warnings.warn("ours", UserWarning, stacklevel=1)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_lacks_its_last_bytes_is_read(progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)
    content = encoded(image, "JPEG", progressive=progressive)
    whole = decode_image(content)
    for lost in (1, 2):  # of the marker of the end
        np.testing.assert_array_equal(decode_image(content[:-lost]), whole)
    shown = decode_image(content[:-20])
    assert (shown == whole).all(axis=2).mean() > 0.98
    for keep in (0.8, 0.5, 0.2):
        with pytest.raises(ImageError, match=r"truncated, about \d+% of the image is missing"):
            decode_image(content[: int(keep * len(content))])


def test_jpeg_of_up_to_twice_the_limit_is_read_at_half_its_size() -> None:
    image = Image.fromarray(picture(60, 80)).resize((800, 600), Image.Resampling.BICUBIC)
    content = encoded(image, "JPEG", quality=95)
    shown = decode_image(content, max_pixels=300_000)
    assert shown.shape == (300, 400, 3)
    half = np.asarray(image.resize((400, 300), Image.Resampling.BOX)).astype(int)
    assert abs(shown - half).mean() < 2
    with pytest.raises(ImageError, match="800×600 pixels exceed the limit of 200000"):
        decode_image(content, max_pixels=200_000)
    with pytest.raises(ImageError, match="exceed the limit"):
        decode_image(encoded(image, "PNG"), max_pixels=300_000)


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_is_decoded_at_the_least_size_with_the_needed_pixels(orientation: int) -> None:
    image = Image.fromarray(picture(60, 80)).resize((800, 600), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "JPEG", quality=95, exif=exif)
    whole = decode_image(content)
    for sides, divisor in (((601, 100), 1), ((151, 151), 2), ((150, 120), 4), ((1, 1), 8)):
        upright = sides if orientation == 1 else sides[::-1]
        shown = decode_image(
            content, needed=lambda *size, sides=upright: sides if size == whole.shape[:2] else size
        )
        assert shown.shape == (whole.shape[0] // divisor, whole.shape[1] // divisor, 3)
        half = np.asarray(Image.fromarray(whole).reduce(divisor)).astype(int)
        assert abs(shown - half).mean() < 2
    assert decode_image(encoded(image, "PNG"), needed=lambda *_: (1, 1)).shape == (600, 800, 3)


def test_gray_bits_are_the_range_of_sixteen_bit_gray() -> None:
    values = np.array([[0, 300, 2048, 4095, 5000]], np.uint16)
    for content in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF")):
        assert decode_image(content, gray_bits=12)[0, :, 0].tolist() == [0, 18, 128, 255, 255]
    wide = encoded(Image.fromarray(np.minimum(values, 4095).astype(np.int32)), "TIFF")
    assert decode_image(wide, gray_bits=12)[0, :, 0].tolist() == [0, 19, 128, 255, 255]
    eight = encoded(Image.fromarray(np.array([[0, 20, 239]], np.uint16)), "PNG")
    assert decode_image(eight, gray_bits=8)[0, :, 0].tolist() == [0, 20, 239]
    color = encoded(Image.fromarray(picture()), "PNG")
    np.testing.assert_array_equal(decode_image(color, gray_bits=8), picture())


def test_installed_plugins_add_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")

    def register() -> None:
        Image.register_open("HEIF", lambda file, _: Image.open(file), lambda prefix: prefix == b"none")
        Image.register_extensions("HEIF", [".heic"])

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    for registry in (Image.OPEN, Image.EXTENSION):
        for key in ("HEIF", ".heic"):
            monkeypatch.setitem(registry, key, None)
            monkeypatch.delitem(registry, key)
    assert runtime.readable_formats.__wrapped__()[".heic"] == "HEIF"
    assert {".avif", ".jp2", ".jpg", ".png"} <= runtime.readable_formats().keys()
