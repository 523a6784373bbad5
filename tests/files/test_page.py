"""The page of a report: every text escaped, everything inside."""

from __future__ import annotations

from html.parser import HTMLParser

from vssm.files.page import Illustration, Section, Table, render

PNG = b"\x89PNG\r\n"
SECTIONS = [
    Section("a<b", ["x & y"], [Table(["<one>"], [["<script>"], ['"']], "c<d", numbers=True)]),
    Section(figures=[Illustration(PNG, 't"t', 'say "so" & <b>'), Illustration("<svg><g/></svg>")]),
]


class Outline(HTMLParser):
    """Tags and texts of a page; a tag that is not closed is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: dict[str, str] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {f"{tag} {name}": value or "" for name, value in attrs}
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "g":
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    assert not found.open
    return found


def test_every_text_is_escaped() -> None:
    found = outline(render("<title>", {"k<": "v&"}, SECTIONS))
    assert "script" not in found.seen
    assert "b" not in found.seen
    for text in ("<title>", "k<: v&", "a<b", "x & y", "<one>", "<script>", "c<d", 't"t'):
        assert text in found.text
    assert found.attributes["img alt"] == 'say "so" & <b>'
    assert found.attributes["table class"] == "numbers"


def test_pictures_are_inside() -> None:
    found = outline(render("t", {}, SECTIONS))
    assert found.attributes["img src"] == "data:image/png;base64,iVBORw0K"
    assert found.seen.count("svg") == 1
    assert not {"link", "script"} & set(found.seen)


def test_what_is_empty_leaves_nothing() -> None:
    page = render("t", {}, [Section()])
    assert not {"h2", "p", "table", "figure"} & set(outline(page).seen)


def test_what_is_invisible_is_shown() -> None:
    hostile = "a\x1b[2J\u202eb\u200b\ud800"
    page = render(hostile, {hostile: hostile}, [Section(hostile, [hostile])])
    assert page.encode().count(rb"a\x1b[2J\u202eb\u200b\ud800") == page.count("<title>") * 6
