import json

import pytest
from questpress.export.text import encodable_json, escape_controls, escape_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00\x07\r\n\tb", "a\\x00\\x07\\x0d\\x0a\\x09b"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),  # the CSI of one byte
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        ("gr\udcfcn", "gr\\xfcn"),  # a byte of a file name
        ("half \ud83d of one", "half \\ud83d of one"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert escape_controls(text) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "text", ["plain", "Größe, naïve", "日本語", "العربية", "می‌خواهم", "👩‍🚀", "a\u200eb", "50 % of <b>"]
)
def test_names_in_any_writing_stay_as_they_are(text: str) -> None:
    assert escape_controls(text) == text


def test_requested_characters_are_preserved() -> None:
    assert escape_controls("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


def test_json_escapes_preserve_the_text() -> None:
    content = {"a\x9b": ["\u202e", "\x7f", "plain ü"]}
    text = escape_json(json.dumps(content, ensure_ascii=False))
    assert json.loads(text) == content and text == '{"a\\u009b": ["\\u202e", "\\u007f", "plain ü"]}'


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "utf-8", None])
def test_json_can_be_written_in_any_encoding(encoding: str | None) -> None:
    content = ["ü", "日本", "👩‍🚀", "94.4–99.1 %"]
    text = encodable_json(json.dumps(content, ensure_ascii=False), encoding)
    assert json.loads(text.encode(encoding or "utf-8").decode(encoding or "utf-8")) == content
    assert ("ü" in text) == (encoding in ("utf-8", None))
