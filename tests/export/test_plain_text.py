import json

import pytest
from questpress.export.text import json_spelled_out, spelled_out


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
def test_what_would_steer_is_spelled_out(text: str, shown: str) -> None:
    assert spelled_out(text) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "text", ["plain", "Größe, naïve", "日本語", "العربية", "می‌خواهم", "👩‍🚀", "a\u200eb", "50 % of <b>"]
)
def test_names_in_any_writing_stay_as_they_are(text: str) -> None:
    assert spelled_out(text) == text


def test_what_is_asked_for_stays() -> None:
    assert spelled_out("a\nb\tc\x1b", but="\n\t") == "a\nb\tc\\x1b"


def test_json_says_the_same_in_other_characters() -> None:
    content = {"a\x9b": ["\u202e", "\x7f", "plain ü"]}
    text = json_spelled_out(json.dumps(content, ensure_ascii=False))
    assert json.loads(text) == content and text == '{"a\\u009b": ["\\u202e", "\\u007f", "plain ü"]}'
