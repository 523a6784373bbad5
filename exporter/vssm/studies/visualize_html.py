"""The figures of all images as one HTML page that refers to no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left }
img { max-width: 100%; height: auto; display: block } figure { margin: 1.5em 0 }
figcaption { max-width: 48em }
"""
HEADINGS = {
    "kept": "Kept tokens",
    "importance": "Importance",
    "attention": "Effective attention",
    "directions": "Effective attention by direction",
    "walks": "Walks of the scan",
}
CAPTIONS = {
    "kept": "Tokens kept after every stage; pruned patches are purple.",
    "importance": "Importance of every token in every block, mean over channels of max(0, y) of "
    "the scan's output before the gate, in the last variant; each map on its own scale. Pruned "
    "places are grey.",
    "attention": "Effective attention of the scan: what each token's input weighs in the scan's "
    "output at the {readout}, mean over channels of |w|, directions added, in percent of the sum. "
    "Computed from the recurrence, gaps included; a row shares its colour scale, which ends at the "
    "99th percentile of its values. Pruned places are grey.",
    "directions": "The same, each direction of the scan by itself.",
    "walks": "How the directions walk the tokens in the last variant, from dark to light; dotted "
    "vermilion steps jump over pruned places, which alignment counts and plain removal forgets. "
    "Where a line is interrupted, the class token stands.",
}


def page(
    facts: Mapping[str, str],
    sections: Iterable[tuple[str, Sequence[Sequence[str]], Mapping[str, bytes]]],
    *,
    readout: str,
) -> str:
    """The page's HTML.

    Args:
        facts: what ran, by name.
        sections: by image: its title, table rows (the first is the head), PNG by figure name.
        readout: whose attention is shown.
    """
    listed = "".join(f"<li>{html.escape(k)}: {html.escape(v)}</li>" for k, v in facts.items())
    body = "".join(_section(*section, readout=readout) for section in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vssm visualize</title><style>{_STYLE}</style></head>
<body><h1>vssm visualize</h1><ul>{listed}</ul>
{body}</body></html>
"""


def _section(
    title: str, rows: Sequence[Sequence[str]], figures: Mapping[str, bytes], *, readout: str
) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rest
    )
    shown = "".join(_figure(name, png, readout) for name, png in figures.items())
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells}</tr>{lines}</table>{shown}\n"


def _figure(name: str, png: bytes, readout: str) -> str:
    data = base64.b64encode(png).decode()
    caption = html.escape(CAPTIONS[name].format(readout=readout))
    return (
        f"<h3>{HEADINGS[name]}</h3>"
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
