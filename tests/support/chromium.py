"""Pages in a headless Chromium: how wide they come out, and in which colours."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

WIDTHS = (500, 1100)
_SCRIPT = """
window.onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument.documentElement;
    const style = frame.contentWindow.getComputedStyle(frame.contentDocument.body);
    found.push([page.clientWidth, page.scrollWidth, style.color, style.backgroundColor]);
  }
  document.getElementById("found").textContent = JSON.stringify(found);
};
"""


@dataclass(frozen=True)
class Laid:
    """One page at one width: pixels it has and needs, and the contrast of its text, 1 to 21."""

    width: int
    needed: int
    contrast: float


def lay_out(pages: Sequence[str], *, dark: bool = False) -> list[Laid]:
    """Every page at every width, in one start of the browser; skips where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine, which lays pages out")
    frames = "".join(
        f'<iframe width="{width}" height="600" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        host = Path(folder) / "host.html"
        host.write_text(f'<pre id="found"></pre>{frames}<script>{_SCRIPT}</script>')
        done = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--window-size=1300,900", f"--user-data-dir={folder}/profile"),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                host.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr
    return [
        Laid(width, needed, _contrast(ink, paper))
        for width, needed, ink, paper in json.loads(html.unescape(found[1]))
    ]


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours such as "rgb(27, 27, 27)"."""
    dim, bright = sorted(map(_luminance, (one, other)))
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
