"""Text that comes from files, keys, labels and names, made safe to show.

A terminal obeys escape sequences, and bidirectional marks make a line read as another than it is.
What is shown to people therefore goes through here: on the terminal, in errors, logs and pages.
"""

from __future__ import annotations

import unicodedata
from typing import Final

# Drawn as nothing, although Unicode's categories call them letters or marks.
_INVISIBLE: Final = frozenset(
    (
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
        *range(0x180B, 0x1810),
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    )
)
_JOINING: Final = frozenset({0x200C, 0x200D, 0xFE0E, 0xFE0F})
# Controls, formats (bidirectional marks, zero widths), surrogates, private and unassigned ones,
# line and paragraph separators.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def shown(value: object, *, limit: int | None = None, lines: bool = False) -> str:
    r"""The text of `value` with what is invisible or controls a terminal written as escapes.

    A lone surrogate, which no encoding can write, is shown as \udc80 too, so the result can
    always be encoded. Letters of every script stay as they are.

    Args:
        value: a text, a path, an exception; others by `str`, so nothing whose text is unbounded.
        limit: longest result; a longer one is cut and ends in "...".
        lines: keep line breaks, of our own layout; a foreign text has none of its own to make.
    """
    text = str(value)
    if limit is not None and len(text) > limit:
        text = f"{text[: max(limit - 3, 0)]}..."
    # Nearly all texts, at the cost of two calls; the rest goes letter by letter.
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_visible(c) or (lines and c == "\n") else _escape(c) for c in text)


def is_plain(text: str) -> bool:
    """Whether `text` may be kept as it is: nothing in it is invisible or controls anything.

    Joiners and selectors of emoji, which Persian, Indic scripts and pictures need, may be in it.
    """
    return all(ord(c) in _JOINING or _is_visible(c) for c in text)


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in _UNSAFE and ord(character) not in _INVISIBLE


def _escape(character: str) -> str:
    code = ord(character)
    if character in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
