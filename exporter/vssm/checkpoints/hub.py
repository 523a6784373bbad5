"""Checkpoints by their address on a Hugging Face hub: hf://OWNER/REPO[@REVISION][/FILE].

huggingface_hub downloads and keeps them; its cache, tokens, mirrors and offline mode are its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from vssm.errors import CheckpointError
from vssm.extras import require
from vssm.files.atomic import check_files
from vssm.files.text import shown

# One slash too: Path("hf://a") is "hf:/a".
_SCHEME: Final = re.compile(r"hf:/{1,2}")
_NAME: Final = r"[\w.-]+"
# A revision with a slash, such as refs/pr/1, is written refs%2Fpr%2F1, as in the hub's own URLs.
_ADDRESS: Final = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[\w.%-]+))?(/(?P<file>[^\0]+))?"
)
INDEX: Final = ".index.json"
# By what is sought first where the address names no file.
_KINDS: Final = ((f".safetensors{INDEX}", ".safetensors"), (".pth", ".pt", ".bin"))


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on a hub; no file means the one that holds weights."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"hf://{self.repo}{revision}" + ("" if self.file is None else f"/{self.file}")


def hub_file(path: str | os.PathLike[str]) -> HubFile | None:
    """What an address names; None for a path.

    Raises:
        ValueError: it begins as an address, but is none.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return None
    found = _ADDRESS.fullmatch(text[scheme.end() :])
    file = None if found is None else found["file"]
    if found is None or ".." in (file or "").split("/"):
        raise ValueError(
            f"checkpoint={shown(text)} is not an address of a hub; write hf://OWNER/REPO/FILE, or "
            "hf://OWNER/REPO@REVISION/FILE"
        )
    revision = found["revision"]
    return HubFile(found["repo"], None if revision is None else revision.replace("%2F", "/"), file)


def check_checkpoint(path: Path | None) -> None:
    """Refuse a checkpoint that is not there, before any work; nothing is downloaded yet.

    Raises:
        ValueError: there is no such file, or it is a malformed address.
        MissingPackageError: it is an address, and huggingface_hub is not installed.
    """
    if path is not None and hub_file(path) is not None:
        require("huggingface_hub")
    else:
        check_files(checkpoint=path)


def download(wanted: HubFile) -> tuple[Path, HubFile]:
    """The file, or the index with its shards beside it, in the hub's cache.

    Returns:
        Where it is, and its address with the commit that the revision stands for.

    Raises:
        CheckpointError: it cannot be had.
        MissingPackageError: huggingface_hub is not installed.
    """
    require("huggingface_hub")
    if wanted.file is None:
        wanted = replace(wanted, file=_choose(wanted))
    path, found = _fetch(wanted)
    if path.name.endswith(INDEX):
        for shard in _shards(path):
            # By the commit: a branch may have moved since the index was read.
            _fetch(replace(found, file=(Path(str(found.file)).parent / shard).as_posix()))
    return path, found


def _fetch(wanted: HubFile) -> tuple[Path, HubFile]:
    from huggingface_hub import hf_hub_download

    name = str(wanted.file)
    try:
        path = Path(hf_hub_download(wanted.repo, name, revision=wanted.revision))
    # Its own errors, those of the network's library and of Xet's: no one class covers them.
    except Exception as error:
        raise _cannot(wanted, error) from error
    # The cache is models--OWNER--REPO/snapshots/COMMIT/FILE.
    commit = path.parents[len(PurePosixPath(name).parts) - 1].name
    return path, replace(wanted, revision=commit)


def _choose(wanted: HubFile) -> str:
    """The one file of weights, safetensors before pickles."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(wanted.repo, revision=wanted.revision)
    except Exception as error:
        raise _cannot(wanted, error) from error
    for endings in _KINDS:
        if found := _of_kind(names, endings):
            if len(found) > 1:
                break
            return found[0]
    seen = ", ".join(shown(name, limit=80) for name in sorted(names)[:8])
    raise CheckpointError(
        f"checkpoint={wanted} has {'several files' if found else 'no file'} of weights; name one: "
        f"{wanted}/FILE, of {seen}"
    )


def _of_kind(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Files with these endings; an index stands for the shards beside it."""
    found = [name for name in names if name.endswith(tuple(endings))]
    return [name for name in found if name.endswith(INDEX)] or found


def _shards(index: Path) -> list[str]:
    """The files that an index names; what is wrong with it, its reader says."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    # The reader refuses other names too, which could lead out of the folder.
    return sorted(n for n in names if isinstance(n, str) and Path(n).name == n)


def _cannot(wanted: HubFile, error: Exception) -> CheckpointError:
    reason = shown(" ".join(str(error).split()) or type(error).__name__, limit=300)
    return CheckpointError(
        f"checkpoint={wanted} cannot be had ({reason}); check the address, log in with `hf auth "
        "login` if it is not public, or give a file"
    )
