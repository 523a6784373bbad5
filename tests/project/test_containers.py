"""The Dockerfiles, as far as one can judge them without Docker: pins, stages, user, copies."""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

DOCKERFILES = ("Dockerfile", "examples/serving/Dockerfile")
_tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def _instructions(path: str) -> list[tuple[str, str]]:
    """Keyword and text of each instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def unpinned(command: str) -> list[str]:
    """What a RUN installs in no exact version: apt's packages, and pip's without constraints."""
    found = []
    for part in command.split(" && "):
        words = part.split()
        if "install" not in words:
            continue
        packages = [w for w in words[words.index("install") + 1 :] if not w.startswith("-")]
        if words[0] == "apt-get":
            found += [name for name in packages if "=" not in name]
        elif "--constraint" not in words:
            found += [name for name in packages if "==" not in name]
    return found


@pytest.mark.parametrize("path", DOCKERFILES)
def test_everything_is_pinned(path: str) -> None:
    instructions = _instructions(path)
    assert [unpinned(text) for word, text in instructions if word == "RUN"] == [
        [] for word, _ in instructions if word == "RUN"
    ]
    given = dict(text.split("=", 1) for word, text in instructions if word == "ARG")
    for word, text in instructions:
        if word == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], text.split()[0])
            assert re.search(r":\d+\.\d+", image), image


def test_what_is_not_pinned_is_found() -> None:
    command = "apt-get update && apt-get install --yes g++ make=4.3 && pip install a==1 b"
    assert unpinned(command) == ["g++", "b"]
    assert unpinned("pip install --constraint constraints.txt a") == []


def test_versions_are_those_of_the_checkout() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for path in DOCKERFILES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert [pin for pin in re.findall(r"[\w-]+==[\w.]+", text) if pin not in pins] == []


def test_the_image_has_the_wheel_alone_and_no_root() -> None:
    instructions = _instructions("Dockerfile")
    starts = [i for i, (word, _) in enumerate(instructions) if word == "FROM"]
    assert len(starts) == 2
    last = instructions[starts[-1] :]
    copied = [text for word, text in last if word == "COPY"]
    assert copied == ["--from=build /opt/vssm /opt/vssm"]
    assert not [text for word, text in last if word == "RUN" and "install" in text]
    (user,) = (text for word, text in last if word == "USER")
    assert user.isdecimal()
    assert int(user) > 0
    assert ("ENTRYPOINT", '["vssm"]') in last


def test_the_build_gets_what_the_source_distribution_holds() -> None:
    copied = []
    for word, text in _instructions("Dockerfile"):
        if word == "COPY" and not text.startswith("--from"):
            copied += text.split()[:-1]
    project = _tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for pattern in project["tool"]["scikit-build"]["sdist"]["include"]:
        path = pattern.strip("/").partition("/*")[0]
        assert any(fnmatch.fnmatch(path, f"{name}*") for name in copied), pattern
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in allowed
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in allowed, name


@pytest.mark.parametrize("path", DOCKERFILES)
def test_hadolint_finds_nothing(path: str) -> None:
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=folders)
    if hadolint is None:
        pytest.skip("no hadolint on this machine, which lints Dockerfiles")
    done = subprocess.run([hadolint, ROOT / path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
