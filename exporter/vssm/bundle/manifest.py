"""`MANIFEST.json` of a bundle: the sha256 of every file, and what could not be put in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from vssm.errors import ArtifactError
from vssm.files.atomic import sha256_of, staged_directory
from vssm.files.json import FieldError, Node

BUNDLE_MANIFEST: Final = "MANIFEST.json"
FORMAT_VERSION: Final = 1


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


def hash_files(directory: Path) -> dict[str, str]:
    """Path and SHA-256 of every file below a bundle but its manifest.

    Raises:
        ArtifactError: something in it is neither a file nor a directory.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path} is a link or no regular file, which no bundle holds; remove it"
            )
        if path.is_file() and name != BUNDLE_MANIFEST:
            found[name] = sha256_of(path)
    return found


def write_bundle_manifest(directory: Path, manifest: BundleManifest) -> None:
    """Write `MANIFEST.json` of a bundle that is being made."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True)
    (directory / BUNDLE_MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_bundle_manifest(directory: Path) -> BundleManifest:
    """Read and check `MANIFEST.json`.

    Raises:
        ArtifactError: it is missing, no JSON, of a newer format, or a field is wrong.
    """
    path = directory / BUNDLE_MANIFEST
    try:
        root = Node.parse(path.read_text(encoding="utf-8"))
        version = root.at("format_version").format_version(FORMAT_VERSION)
        files = {name: node.sha256() for name, node in root.at("files").entries(at_least=1)}
        for name in files:
            _refuse_outside(name)
        return BundleManifest(
            name=root.at("name").text(),
            files=files,
            absent={name: node.text() for name, node in root.at("absent").entries()},
            versions={name: node.text() for name, node in root.at("versions").entries()},
            format_version=version,
        )
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}), so {directory} is not a bundle; name the "
            "directory that `vssm bundle -o` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged or was edited: {error}; make the bundle again"
        ) from error


def _refuse_outside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise FieldError(f"files has the key {name!r}, which is no plain path inside the bundle")


def compare_files(directory: Path, manifest: BundleManifest) -> list[str]:
    """What is missing, extra or changed, as sentences; nothing if all is as it was made."""
    found = hash_files(directory)
    listed = manifest.files
    return [
        *(f"{name} is missing" for name in sorted(listed.keys() - found.keys())),
        *(f"{name} is not listed" for name in sorted(found.keys() - listed.keys())),
        *(
            f"{name} was changed: its sha256 is {found[name][:12]}..., not {listed[name][:12]}..."
            for name in sorted(listed.keys() & found.keys())
            if found[name] != listed[name]
        ),
    ]


def staged_bundle(target: Path, *, force: bool) -> AbstractContextManager[Path]:
    """An empty directory to write a bundle into; it moves into `target` on success.

    Raises:
        ArtifactError: `target` exists and not `force`, or is no bundle as it was made, or cannot
            be written. Nothing was changed then.
    """

    def replaceable(final: Path) -> Collection[str]:
        entries = [entry.name for entry in final.iterdir()]
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
            f"output={final} holds no {BUNDLE_MANIFEST}, so it is no bundle and is not replaced; "
            "name another directory"
        )
    if changed := compare_files(final, read_bundle_manifest(final)):
        raise ArtifactError(
            f"output={final} is not as it was made ({changed[0]}), so replacing it could lose "
            "work; move it away, or name another directory"
        )
