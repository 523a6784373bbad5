"""Reports as one HTML page that refers to no other file: facts, tables, figures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vssm.files.text import shown


@dataclass(frozen=True)
class Table:
    """A table: texts in rows below `columns`; `numbers`: all but the first column to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: bool = False


@dataclass(frozen=True)
class Illustration:
    """A picture: the bytes of a PNG file, or the text of an SVG element, which is trusted."""

    picture: bytes | str
    title: str = ""
    caption: str = ""

    @property
    def source(self) -> str:
        """A PNG as the page holds it; empty for an SVG."""
        if isinstance(self.picture, str):
            return ""
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page, in this order: paragraphs, tables, figures."""

    title: str = ""
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Illustration] = ()


_TEMPLATE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 1em 0 }
caption { text-align: left; font-weight: 600 } th, td { overflow-wrap: normal }
th, td { border-bottom: 1px solid var(--line); padding: .25em .8em; text-align: left }
.numbers :is(th, td):not(:first-child) { text-align: right }
img, svg { max-width: 100%; height: auto; display: block; background: #fff }
figure { margin: 1.5em 0 } figcaption { max-width: 48em }
</style></head>
<body><h1>{{ title }}</h1>
<ul>{% for name, fact in facts.items() %}<li>{{ name }}: {{ fact }}</li>{% endfor %}</ul>
{% for section in sections -%}
{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}
{% for text in section.paragraphs %}<p>{{ text }}</p>{% endfor %}
{% for table in section.tables -%}
<div class="scroll"><table{% if table.numbers %} class="numbers"{% endif %}>
{%- if table.caption %}<caption>{{ table.caption }}</caption>{% endif %}
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows -%}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</table></div>
{% endfor -%}
{% for figure in section.figures -%}
{% if figure.title %}<h3>{{ figure.title }}</h3>{% endif %}
<figure>
{%- if figure.source %}<img alt="{{ figure.caption }}" src="{{ figure.source }}">
{%- else %}{{ figure.picture | safe }}{% endif %}
{%- if figure.caption %}<figcaption>{{ figure.caption }}</figcaption>{% endif %}</figure>
{% endfor -%}
{% endfor -%}
</body></html>
"""


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page's HTML; every text is escaped.

    Args:
        title: of the page.
        facts: what was run, by name.
        sections: what was found.
    """
    from jinja2 import Environment, StrictUndefined

    # An SVG comes from our own plots; every other text may be a stranger's.
    template = Environment(
        autoescape=True,
        # A misspelt name is an error, not an empty place on the page.
        undefined=StrictUndefined,
        # `__html__` has what is marked as safe: `shown` would make it a text that is escaped again.
        finalize=lambda value: value if hasattr(value, "__html__") else shown(value, lines=True),
    ).from_string(_TEMPLATE)
    return template.render(title=title, facts=facts, sections=sections)
