"""Foreign text: nothing that a terminal obeys, that is invisible, or that turns a line around."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from vssm.files.text import is_plain, shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("tench", "tench"),
        ("Größe 猫 кот", "Größe 猫 кот"),
        ("naïve e\u0301", "naïve e\u0301"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x9b1m", "\\x9b1m"),
        ("abc\u202egpj", "abc\\u202egpj"),
        ("a\u2066b\u2069", "a\\u2066b\\u2069"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("x\u3164y\ufe05\U000e0100", "x\\u3164y\\ufe05\\U000e0100"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("lone \udc80 \ud800", "lone \\udc80 \\ud800"),
    ],
)
def test_what_is_shown(text, safe):
    assert shown(text) == safe
    assert is_plain(text) == (text == safe)


def test_joiners_may_be_kept_and_are_shown():
    for text in (
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u2764\ufe0f",
        "a\u200db",
    ):
        assert is_plain(text)
        assert "\\u" in shown(text)


def test_every_character_can_be_shown_and_written():
    for start in range(0, sys.maxunicode + 1, 4096):
        safe = shown("".join(map(chr, range(start, start + 4096))))
        safe.encode()
        assert all(unicodedata.category(c)[0] != "C" for c in set(safe)), hex(start)


def test_limits_lines_and_other_values(tmp_path):
    assert shown("x" * 100, limit=10) == "xxxxxxx..."
    assert shown("a\nb\x07", lines=True) == "a\nb\\x07"
    assert shown(tmp_path / "a\nb").endswith("a\\nb")
    assert shown(ValueError("a\x1b")) == "a\\x1b"
