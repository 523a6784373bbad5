"""Runs the code blocks of README.md in order, as a reader would: one folder, one shell, one Python.

Blocks in bash, console (the lines after `$ `; what they show is not compared) and python run; a
comment `<!-- not run: reason -->` directly above leaves one out, and `<!-- slow: reason -->` leaves
it to `make test-all`, which also runs README.md in a process of its own, on the model that is
printed. `make test` runs it, and pages of docs/, in this process and on tiny models of the printed
names: a short command spends its time on imports, and an export on blocks.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, SUPPORT

README = ROOT / "README.md"
PAGES = ("evaluate.md", "finetune.md", "ablate.md", "add_a_family.md")
_RUN = frozenset({"bash", "console", "python"})
_SHOWN = frozenset({"cmake", "cpp", "diff", "html", "json", "mermaid", "text", "toml", "yaml"})
# What a reader finds in the folder; the package itself comes from the environment.
_NOT_LINKED = frozenset({".git", "build", "demo", "dist", "exporter", "out", "out_python"})
_MAKE = """
make() {
  for target in "$@"; do
    case "$target" in
      *=*) ;;
      setup) test -x .venv/bin/python || command make -C "$VSSM_CHECKOUT" setup ;;
      demo) python examples/demo.py --quick -o demo ;;
      lint | test | test-all) echo "make $target: not from within the tests" ;;
      *) echo "make $target: mark this block <!-- not run: reason -->" >&2; return 2 ;;
    esac || return
  done
}
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its opening fence."""

    line: int
    language: str
    code: str
    not_run: str | None
    slow: bool


def code_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text.

    Raises:
        ValueError: a block has no known language, or no end.
    """
    found: list[Block] = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        fence = re.fullmatch(r"\s*(`{3,}|~{3,})\s*(\w*).*", lines[i])
        if not fence:
            i += 1
            continue
        ends = [j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[1]]
        if not ends:
            raise ValueError(f"line {i + 1}: the block has no closing {fence[1]}")
        if fence[2] not in _RUN | _SHOWN:
            raise ValueError(
                f"line {i + 1}: language={fence[2]!r} is none of {sorted(_RUN | _SHOWN)}; "
                "name the one that runs, or text"
            )
        note = re.fullmatch(r"\s*<!-- (not run|slow): (.+) -->\s*", lines[i - 1]) if i else None
        kind, reason = note.groups() if note else (None, None)
        code = textwrap.dedent("\n".join(lines[i + 1 : ends[0]])) + "\n"
        not_run = reason if kind == "not run" else None
        found.append(Block(i + 1, fence[2], code, not_run, kind == "slow"))
        i = ends[0] + 1
    return found


def shell_code(block: Block) -> str:
    """What is typed into the shell.

    Raises:
        ValueError: a console block has no line that begins with `$ `.
    """
    if block.language == "bash":
        return block.code
    typed: list[str] = []
    for line in block.code.splitlines():
        if line.startswith("$ ") or (line.startswith("> ") and typed and typed[-1].endswith("\\")):
            typed.append(line[2:])
    if not typed:
        raise ValueError(f"line {block.line}: a console block needs a line that begins with '$ '")
    return "\n".join(typed)


def run_blocks(
    text: str, page: str, *, shell: Callable[[str], None] | None = None, slow: bool = True
) -> None:
    """Run the blocks from the current folder on; the first failure ends it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in code_blocks(text):
        if block.language not in _RUN or block.not_run or (block.slow and not slow):
            continue
        sys.stdout.write(f"--- {page}:{block.line} {block.language}\n{block.code}")
        sys.stdout.flush()
        if block.language == "python":
            code = compile("\n" * block.line + block.code, page, "exec")
            exec(code, names)
        else:
            (shell or _run_shell)(shell_code(block))


def run_here(code: str) -> None:
    """Run a block that only calls `vssm`, in this process.

    Raises:
        ValueError: it calls something else.
        AssertionError: a command fails.
    """
    from vssm.commands.main import main

    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "vssm":
            raise ValueError(f"{line}: a page's blocks call vssm alone; mark it <!-- not run: -->")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            try:
                main()
                code: object = 0
            except SystemExit as stop:
                code = stop.code
        assert not code, line


def run_vssm_here(code: str) -> None:
    """Run a block that only calls `vssm` in this process, and another one in bash."""
    if re.match(r"vssm ", code):
        run_here(code)
    else:
        _run_shell(code)


def _run_shell(code: str) -> None:
    """Run in bash; its environment and folder are this process's afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        script = f'set -eo pipefail\n{_MAKE}\n{code}\nenv -0 > "$1"'
        subprocess.run(
            ["bash", "-c", script, "README.md", str(state)], check=True, stdin=subprocess.DEVNULL
        )
        pairs = (entry.partition("=") for entry in state.read_text().split("\0") if entry)
        os.environ.update({name: value for name, _, value in pairs})
    os.chdir(os.environ["PWD"])


def link_checkout(folder: Path) -> None:
    """Put what a reader finds beside README.md into `folder`."""
    for entry in ROOT.iterdir():
        if entry.name not in _NOT_LINKED and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)


def run_readme(readme: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a README's blocks in `folder`, in a process of their own."""
    link_checkout(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")])
    command = [sys.executable, str(Path(__file__)), str(readme)]
    return subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.pathsep.join(paths),
            "VSSM_CHECKOUT": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links that lead to no file, or to no heading of a page."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        path, _, part = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        if not (folder / path).exists():
            broken.append(target)
        elif part and (not path or path.endswith(".md")):
            page = (folder / path).read_text(encoding="utf-8") if path else text
            broken += [] if part in anchors(page) else [target]
    return broken


def anchors(text: str) -> set[str]:
    """What `#` may be followed by in a link to a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def _readme_text() -> str:
    assert README.is_file(), "README.md is missing: nothing tells a newcomer how to begin"
    return README.read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick_rates")
def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it, where the reader's shell and Python are this process."""
    import docs_pages

    assert any(b.language == "bash" for b in code_blocks(_readme_text())), "README.md runs nothing"
    docs_pages.make_tiny_readme(monkeypatch)
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in os.environ:  # what the blocks change is put back
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setenv("VSSM_CHECKOUT", str(ROOT))
    run_blocks(_readme_text(), "README.md", shell=run_vssm_here)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As it is printed, with vim_tiny itself and the command from PATH."""
    done = run_readme(README, tmp_path)
    if done.returncode:
        pytest.fail(done.stdout[-6000:], pytrace=False)


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path: Path) -> None:
    done = run_readme(ROOT / "docs/quickstart.md", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "pictures/index.html").is_file()


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command as it is printed, in the order of the page."""
    import docs_pages
    from plots import leave_plots_out

    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    # A command in the text that nothing runs would be the next one to go out of date.
    assert not re.search(r"^    vssm ", text, re.MULTILINE)
    docs_pages.make_tiny(monkeypatch, dense=slow)
    docs_pages.make_files(tmp_path, export=page in {"evaluate.md", "ablate.md"})
    if slow:
        docs_pages.make_dense(tmp_path)
        (tmp_path / "examples").symlink_to(ROOT / "examples")
    else:
        leave_plots_out(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("vssm.runtimes.session.usable_cores", lambda: 1)  # no worker processes
    run_blocks(text, f"docs/{page}", shell=run_here, slow=slow)


def test_readme_links() -> None:
    assert broken_links(_readme_text(), ROOT) == []
    for page in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CHANGELOG.md"):
        assert broken_links(page.read_text(encoding="utf-8"), page.parent) == [], page.name


def test_how_it_works_names_what_is_there() -> None:
    text = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py)`\s+`(\w+)(?:\(\))?`", text)
    assert len(named) > 20
    for file, name in named:
        code = (ROOT / "exporter/vssm" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:    )?(?:def|class) {name}\b", code, re.MULTILINE), (file, name)
    for file in re.findall(r"`(plugins/[a-z_/.]+)`", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(
    "block",
    [b for b in code_blocks(README.read_text("utf-8")) if b.not_run] if README.is_file() else [],
    ids=lambda block: f"line{block.line}",
)
def test_block_left_out(block: Block) -> None:
    pytest.skip(f"README.md:{block.line} not run: {block.not_run}")


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```\n"


def test_blocks_share_folder_environment_and_names(tmp_path: Path) -> None:
    text = (
        _fenced("bash", "make setup PIP_ARGS=x && mkdir -p made && cd made\nexport VSSM_X=7")
        + _fenced("python", "import os\nx = int(os.environ['VSSM_X'])")
        + _fenced("console", "$ test -x ../.venv/bin/python\n$ echo 1 \\\n> 2 > out.txt\n1 2")
        + _fenced("text", "never run")
        + "<!-- not run: needs a GPU -->\n"
        + _fenced("bash", "false")
        + "1. In a list:\n\n"
        + textwrap.indent(_fenced("python", "open('x.txt', 'w').write(str(x))"), "   ")
    )
    readme = tmp_path / "README.md"
    readme.write_text(text)
    done = run_readme(readme, tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "made/out.txt").read_text() == "1 2\n"
    assert (tmp_path / "made/x.txt").read_text() == "7"
    assert [b.not_run for b in code_blocks(text) if b.not_run] == ["needs a GPU"]


@pytest.mark.parametrize(
    ("language", "code", "message"),
    [
        ("bash", "false | cat\necho reached", "README.md:1 bash"),
        ("bash", "make install", "mark this block"),
        ("python", "x = 1\nx.no_such_name", "line 3"),
        ("console", "$ vssm no-such-command", "no-such-command"),
        ("console", "vssm models", "needs a line that begins"),
        ("sh", "true", "language='sh'"),
        ("", "true", "language=''"),
        ("bash", "true\n``", "no closing"),
    ],
)
def test_failure_is_found(tmp_path: Path, language: str, code: str, message: str) -> None:
    readme = tmp_path / "README.md"
    text = _fenced(language, code)
    readme.write_text(text.rstrip("`\n") if message == "no closing" else text)
    done = run_readme(readme, tmp_path)
    assert done.returncode == 1
    assert message in done.stdout
    assert "\nreached" not in done.stdout.replace("echo reached", "")


def test_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# `a_b`: one, two\n")
    text = "# D\n[a](a.md#a_b-one-two) [b](docs/b.md) [c](https://example.org/c#c) [d](#d)"
    assert broken_links(text, tmp_path) == ["docs/b.md"]
    assert broken_links("[a](a.md#part) [d](#d)", tmp_path) == ["a.md#part", "#d"]


if __name__ == "__main__":
    # Without this folder and what tests share: the blocks see what a reader's Python sees.
    sys.path[:] = [folder for folder in sys.path[1:] if folder != str(SUPPORT)]
    os.environ["PYTHONPATH"] = (
        os.environ["PYTHONPATH"].removeprefix(str(SUPPORT)).lstrip(os.pathsep)
    )
    run_blocks(Path(sys.argv[1]).read_text(encoding="utf-8"), "README.md")
