"""`MANIFEST.json` of a bundle: the sha256 of every file, and what could not be put in.

Files have mode 0644 and directories 0755, whatever the umask was, so that a changed mode is seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from vssm.errors import ArtifactError
from vssm.files.atomic import sha256_of
from vssm.files.json import FieldError, Node, read_json
from vssm.files.regular import JSON, read_regular
from vssm.files.staging import is_work, staged_directory
from vssm.files.text import shown

BUNDLE_MANIFEST: Final = "MANIFEST.json"
FORMAT_VERSION: Final = 1
_FILE_MODE: Final = 0o644
_FOLDER_MODE: Final = 0o755
_SHA256: Final = "sha256"  # the key of the content's own hash


@dataclass(frozen=True)
class BundleManifest:
    """The whole of `MANIFEST.json`.

    Attributes:
        name: of the model, as Triton calls it.
        files: path inside the bundle, with "/", to the file's SHA-256; all but this file.
        absent: parts that are left out, and what would bring each in.
        versions: versions that made the bundle, "vssm" among them.
    """

    name: str
    files: Mapping[str, str]
    absent: Mapping[str, str]
    versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION


def hash_files(directory: Path, *, working: bool = False) -> dict[str, str]:
    """Path and SHA-256 of every file below a bundle but its manifest.

    Args:
        directory: the bundle.
        working: pass over what a living process is writing into it.

    Raises:
        ArtifactError: something in it is neither a file nor a directory.
    """
    found = {}
    for path, status in _entries(directory, working=working):
        name = path.relative_to(directory).as_posix()
        if stat.S_ISREG(status.st_mode) and name != BUNDLE_MANIFEST:
            found[name] = sha256_of(path)
    return found


def _entries(directory: Path, *, working: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below a bundle, with what it is itself, not what it leads to."""
    for path in sorted(directory.rglob("*")):
        if working and is_work(path.relative_to(directory).parts[0]):
            continue
        status = path.lstat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ArtifactError(
                f"{shown(path)} is a link or no regular file, which no bundle holds; remove it"
            )
        yield path, status


def write_bundle_manifest(directory: Path, manifest: BundleManifest) -> None:
    """Write `MANIFEST.json` of a bundle that is being made, and set the modes."""
    content = dataclasses.asdict(manifest)
    text = json.dumps({**content, _SHA256: _own_sha256(content)}, indent=2, sort_keys=True)
    # Plainly: the directory is staged, so nobody sees it before it is whole.
    (directory / BUNDLE_MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path, status in _entries(directory):
        path.chmod(_FOLDER_MODE if stat.S_ISDIR(status.st_mode) else _FILE_MODE)


def _own_sha256(content: Mapping[str, Any]) -> str:
    """Of all else in the file: an edit of any field is seen, unless the hash is edited too."""
    rest = {key: value for key, value in content.items() if key != _SHA256}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_bundle_manifest(directory: Path) -> BundleManifest:
    """Read and check `MANIFEST.json`.

    Raises:
        ArtifactError: it is missing, no JSON, of a newer format, or a field is wrong.
    """
    return read_json(
        directory / BUNDLE_MANIFEST,
        _parse,
        absent=f"{directory} is not a bundle; name the directory that `vssm bundle -o` wrote",
        damaged="make the bundle again",
    )


def _parse(root: Node) -> BundleManifest:
    version = root.at("format_version").format_version(FORMAT_VERSION)
    files = {name: node.sha256() for name, node in root.at("files").entries(at_least=1)}
    for name in files:
        _refuse_outside(name)
    manifest = BundleManifest(
        name=root.at("name").text(),
        files=files,
        absent={name: node.text() for name, node in root.at("absent").entries()},
        versions={name: node.text() for name, node in root.at("versions").entries()},
        format_version=version,
    )
    if root.at(_SHA256).sha256() != _own_sha256(root.mapping()):
        raise FieldError("its content does not have the sha256 that it gives for itself")
    return manifest


def _refuse_outside(name: str) -> None:
    path = PurePosixPath(name)
    # "a//b" and "./a" would be second names of a file.
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise FieldError(
            f"files has the key {shown(repr(name))}, which is not a plain path inside the bundle"
        )


def compare_files(directory: Path, manifest: BundleManifest, *, working: bool = False) -> list[str]:
    """What is missing, extra or changed, as sentences; `working` as for `hash_files`."""
    found = hash_files(directory, working=working)
    listed = manifest.files
    return [
        *(f"{name} is missing" for name in sorted(listed.keys() - found.keys())),
        *(f"{shown(name)} is not listed" for name in sorted(found.keys() - listed.keys())),
        *(
            f"{name} was changed: its sha256 is {found[name][:12]}..., not {listed[name][:12]}..."
            for name in sorted(listed.keys() & found.keys())
            if found[name] != listed[name]
        ),
        *_compare_entries(directory, manifest, working=working),
    ]


def _compare_entries(directory: Path, manifest: BundleManifest, *, working: bool) -> Iterator[str]:
    """Directories that hold nothing of the bundle, modes, and owners that stand out."""
    owner = directory.stat().st_uid
    folders = {
        parent.as_posix() for name in manifest.files for parent in PurePosixPath(name).parents
    }
    for path, status in _entries(directory, working=working):
        name = path.relative_to(directory).as_posix()
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and name not in folders:
            yield f"{shown(name)}, a directory, is not listed"
        wanted, mode = _FOLDER_MODE if is_folder else _FILE_MODE, stat.S_IMODE(status.st_mode)
        if mode != wanted:
            yield f"{shown(name)} was changed: its mode is {mode:04o}, not {wanted:04o}"
        if status.st_uid != owner:
            yield (
                f"{shown(name)} was changed: it belongs to user {status.st_uid}, the bundle to "
                f"{owner}"
            )


def read_listed(directory: Path, manifest: BundleManifest, name: str) -> bytes:
    """A small file's bytes, read once, whose SHA-256 is the one in the manifest.

    Raises:
        ArtifactError: it is missing, not listed, or was changed.
    """
    try:
        data = read_regular(directory / name, limit=JSON)
    except OSError as error:
        raise ArtifactError(
            f"{directory / name} cannot be read ({error.strerror}); make the bundle again"
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
        raise ArtifactError(
            f"{directory / name} is not the file that {BUNDLE_MANIFEST} lists; make the bundle "
            "again"
        )
    return data


def staged_bundle(target: Path, *, force: bool) -> AbstractContextManager[Path]:
    """An empty directory to write a bundle into; it moves into `target` on success.

    Raises:
        ArtifactError: `target` exists and not `force`, or is no bundle as it was made, or cannot
            be written. Nothing was changed then.
    """

    def replaceable(final: Path) -> Collection[str]:
        # Our own work directory may lie in it when this is asked for the second time.
        entries = [entry.name for entry in final.iterdir() if not is_work(entry.name)]
        if entries:
            _refuse_loss(final, force)
        return entries

    return staged_directory(target, replaceable=replaceable, last=BUNDLE_MANIFEST)


def _refuse_loss(final: Path, force: bool) -> None:
    if not force:
        raise ArtifactError(
            f"output={final} is already there and is not overwritten unasked; name another "
            f"directory, or pass force=True (--force) to replace a bundle"
        )
    if not (final / BUNDLE_MANIFEST).is_file():
        raise ArtifactError(
            f"output={final} holds no {BUNDLE_MANIFEST}, so it is not a bundle and is not "
            "replaced; name another directory"
        )
    # `working`: what we or another process are just writing into it is no change of the bundle.
    if changed := compare_files(final, read_bundle_manifest(final), working=True):
        raise ArtifactError(
            f"output={final} is not as it was made ({changed[0]}), so replacing it could lose "
            "work; move it away, or name another directory"
        )
