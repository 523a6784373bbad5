"""The documentation site: every page is in it, it builds without a warning, and fits screens."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chromium
import pytest
from checkout import PYTHONPATH, ROOT

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "first_steps.ipynb"
# The first page, code, wide tables, pictures, the notebook, and docstrings.
_SHOWN = ("", "quickstart/", "performance/", "gallery/", "first_steps/", "api/pruning/")


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'{package} is not installed: pip install "vssm[docs]"')


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "nbconvert"):
        _need(package)
    folder = tmp_path_factory.mktemp("site")
    done = _run("mkdocs", "build", "--strict", "--site-dir", folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "WARNING" not in said, said
    return folder


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    placed = set(re.findall(r"^ +- .+: (\w+\.md)$", config, re.MULTILINE))
    assert {page.name for page in DOCS.glob("*.md")} <= placed
    assert {"index.md", f"{NOTEBOOK.stem}.md"} <= placed


@pytest.mark.slow
def test_pages_fit_and_say_nothing_on_the_console(site: Path) -> None:
    for laid in chromium.lay_out_files(site, _SHOWN):
        assert laid.needed <= laid.width


@pytest.mark.slow
def test_a_page_needs_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"',
            page.read_text(encoding="utf-8"),
        )
        assert loaded == [], page


@pytest.mark.slow
def test_the_api_has_every_public_name(site: Path) -> None:
    import vssm

    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    missing = [n for n, module in vssm._PUBLIC.items() if f'id="{module}.{n}"' not in pages]
    assert missing == []


@pytest.mark.slow
def test_the_notebook_gives_what_it_shows(tmp_path: Path) -> None:
    for package in ("nbconvert", "ipykernel"):
        _need(package)
    done = _run("nbconvert", "--execute", "--to=notebook", f"--output-dir={tmp_path}", NOTEBOOK)
    assert done.returncode == 0, done.stderr[-4000:]
    assert _texts(tmp_path / NOTEBOOK.name) == _texts(NOTEBOOK)


def _texts(notebook: Path) -> list[list[str]]:
    """What each output of a notebook says."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs
    return [output.get("text", output.get("data", {}).get("text/plain")) for output in outputs]
