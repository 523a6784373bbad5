"""What the site has beside the pages of docs/: pages that lie elsewhere, the notebook, the API.

mkdocs calls these functions. On GitHub a link leads from file to file; the site has other places
for some of the files, so every link is led to where its file went.
"""

from __future__ import annotations

import collections
import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

import vssm

_ROOT: Final = Path(__file__).resolve().parents[1]
# Files outside docs/ that pages link, and their places in the site.
_ELSEWHERE: Final = {
    "README.md": "index.md",
    "docs": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/study-digits.csv": "study-digits.csv",
    "benchmarks/results/study-mnist.csv": "study-mnist.csv",
    "examples/README.md": "examples.md",
    "examples/cpp/CMakeLists.txt": "CMakeLists.txt",
    "tests/official/README.md": "fixtures.md",
}
_FROM: Final = {place: path for path, place in _ELSEWHERE.items() if path != "docs"}
_NOTEBOOK: Final = "first_steps"
# A relative link's target; what follows it, such as #part, stays.
_LINK: Final = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])[^)#\s]+")
# Objects that `vssm` itself does not name.
_BESIDE: Final = {
    "compat": (
        "vssm.compat.packages.context.upstream",
        "vssm.compat.packages.context.UpstreamReport",
        "vssm.compat.packages.scan.selective_scan_fn",
        "vssm.compat.packages.scan.selective_scan_tokens",
    ),
    "errors": ("vssm.errors",),
}


def on_config(config: MkDocsConfig) -> None:
    """Add the API to the navigation."""
    assert config.nav is not None
    config.nav.append({"API": list(_api_pages())})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what docs/ does not hold."""
    for place, path in _FROM.items():
        files.append(File.generated(config, place, abs_src_path=str(_ROOT / path)))
    made: dict[str, str | bytes] = {**_api_pages(), **_notebook()}
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to files that have another place in the site there."""
    place = page.file.src_uri
    here = _FROM.get(place, f"docs/{place}")

    def led(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[0]))
        target = _ELSEWHERE.get(path, path.removeprefix("docs/").replace(".ipynb", ".md"))
        return posixpath.relpath(target, posixpath.dirname(place))

    return _LINK.sub(led, markdown)


def _api_pages() -> dict[str, str]:
    """A page for each room of the package that has public names."""
    rooms = collections.defaultdict(list)
    for name, module in sorted(vssm._PUBLIC.items()):
        rooms[module.split(".")[1]].append(f"{module}.{name}")
    for room, identifiers in _BESIDE.items():
        rooms[room] += identifiers
    return {
        f"api/{room}.md": f"# {room}\n\n" + "\n".join(f"::: {each}" for each in rooms[room])
        for room in sorted(rooms)
    }


def _notebook() -> dict[str, str | bytes]:
    """The notebook as a page, with the pictures that its cells made."""
    exporter = MarkdownExporter()
    page, resources = exporter.from_filename(str(_ROOT / f"docs/{_NOTEBOOK}.ipynb"))
    return {f"{_NOTEBOOK}.md": page, **resources["outputs"]}
