"""Pages in a headless Chromium: how wide they come out, in which colours, and what goes wrong."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

WIDTHS = (400, 1400)
_HOST = "_host.html"
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
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.html" for number in range(len(pages))]
        for name, page in zip(names, pages, strict=True):
            Path(folder, name).write_text(page, encoding="utf-8")
        return lay_out_files(Path(folder), names, dark=dark)


def lay_out_files(folder: Path, names: Sequence[str], *, dark: bool = False) -> list[Laid]:
    """Pages of a folder that may refer to its other files, at every width.

    Raises:
        AssertionError: a page wrote to the console, as it does of a fault or of a file it misses.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine, which lays pages out")
    frames = "".join(
        f'<iframe width="{width}" height="600" src="{html.escape(name)}"></iframe>'
        for name in names
        for width in WIDTHS
    )
    host = f'<pre id="found"></pre>{frames}<script>{_SCRIPT}</script>'
    # Over HTTP: pages from files may not look into one another, nor fetch what they search in.
    handler = functools.partial(_Handler, host.encode(), directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            done = subprocess.run(
                [
                    *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                    *("--window-size=1600,900", f"--user-data-dir={profile}"),
                    *("--enable-logging=stderr", "--virtual-time-budget=2000"),
                    f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                    f"http://127.0.0.1:{server.server_port}/{_HOST}",
                ],
                capture_output=True,
                text=True,
                timeout=240,
                check=True,
            )
    finally:
        server.shutdown()
        server.server_close()
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not said, said
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr
    return [
        Laid(width, needed, _contrast(ink, paper))
        for width, needed, ink, paper in json.loads(html.unescape(found[1]))
    ]


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and the page that holds the frames."""

    def __init__(self, host: bytes, *args: object, **given: object) -> None:
        self._host = host
        super().__init__(*args, **given)

    def do_GET(self) -> None:
        if self.path not in {f"/{_HOST}", "/favicon.ico"}:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self._host if self.path == f"/{_HOST}" else b"")

    def log_message(self, *args: object) -> None:
        """Nothing: the test's output is no server's log."""


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours such as "rgb(27, 27, 27)"."""
    dim, bright = sorted(map(_luminance, (one, other)))
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
