"""An exported directory as one object; the running side's way in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from vssm.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from vssm.artifact.model_file import ModelFacts, differences, read_facts
from vssm.errors import ArtifactError
from vssm.files.private import private_path
from vssm.files.regular import JSON, ONNX, WEIGHTS, open_regular, read_regular
from vssm.files.staging import settle, staged_directory

MODEL_FILE = "model.onnx"
INLINED_FILE = "model.inlined.onnx"
EXTERNAL_FILE = "model.onnx.data"  # weights of a model above protobuf's limit
WEIGHTS_FILE = "weights.safetensors"
# What our commands write into an export's directory, whether or not its manifest lists it.
EXPORT_FILES: Final = frozenset(
    {
        MANIFEST_NAME,
        "model.onnx",
        "model.inlined.onnx",
        EXTERNAL_FILE,
        "weights.safetensors",
        "parity.json",
        "bench.json",
        "bench.html",
        "model.plan",
        "engine.json",
        "model.rtx.plan",
        "engine.rtx.json",
        "evaluate.csv",
        "evaluate.csv.journal",
        "evaluate.json",
    }
)


_REMEDY: Final = "export the model again, or copy the whole directory again"
_CHUNK: Final = 1 << 20
_ONNX_FILES: Final = frozenset({MODEL_FILE, INLINED_FILE})


@dataclass(frozen=True)
class Artifact:
    """An export: its directory and what `model.json` says of it.

    Its files are read through it, so that what is used is what was checked.
    """

    directory: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file with custom operators and their fallback bodies."""
        return self.directory / MODEL_FILE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, height, width) of the input; of free sizes those of the example at export."""
        sizes = self.manifest.sizes
        _, *shape = self.manifest.inputs[0].shape
        channels, height, width = (n if isinstance(n, int) else sizes[n].example for n in shape)
        return channels, height, width

    def read(self, name: str) -> bytes:
        """A file's bytes, read once, whose SHA-256 is the one in model.json.

        Raises:
            ArtifactError: it is missing, not listed or was changed; or it is an ONNX file that
                holds something else than model.json claims.
        """
        return self._read_model(name)[0] if name in _ONNX_FILES else self._read(name, WEIGHTS)

    def _read(self, name: str, limit: int) -> bytes:
        with _opened(self, name, limit) as file:
            data = file.read()
        _refuse_change(self, name, hashlib.sha256(data).hexdigest())
        return data

    def _read_model(self, name: str) -> tuple[bytes, ModelFacts]:
        """An ONNX file and what it says, which is what model.json claims."""
        data = self._read(name, ONNX)
        # The hash stands in model.json: whoever edits that can edit the hash as well, so the model
        # itself must say the same.
        facts = read_facts(data)
        if differing := differences(self.manifest, facts, inlined=name == INLINED_FILE):
            raise ArtifactError(
                f"file={self.directory / name}: {differing[0]}; {MANIFEST_NAME} was edited, or is "
                f"of another model; {_REMEDY}"
            )
        return data, facts

    def _verify(self, name: str) -> None:
        """Check a file, and with an ONNX file what it keeps beside itself."""
        if name in _ONNX_FILES:
            for beside in sorted(self._read_model(name)[1].external):
                self._verify(beside)
            return
        digest = hashlib.sha256()
        with _opened(self, name, WEIGHTS) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        _refuse_change(self, name, digest.hexdigest())

    def copy(self, name: str, target: Path) -> None:
        """Copy a file, whatever its size; the copy's SHA-256 is the one in model.json.

        Raises:
            ArtifactError: it is missing, not listed or was changed.
            OSError: the copy cannot be written.
        """
        digest = hashlib.sha256()
        # "x": neither over a file that is there nor through a link.
        with _opened(self, name, WEIGHTS) as file, target.open("xb") as copy:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        _refuse_change(self, name, digest.hexdigest())

    @contextlib.contextmanager
    def opened_model(self, graph: bytes | None = None) -> Iterator[str]:
        """A path to the model for a runtime to open, behind which nobody can put another one.

        Weights that lie beside the model are copied with it, to where TMPDIR points.

        Args:
            graph: an edit of the model that stands in its place.

        Raises:
            ArtifactError: as `read`.
        """
        data, facts = self._read_model(MODEL_FILE)
        shown = data if graph is None else graph
        if not facts.external:
            with private_path(shown, MODEL_FILE) as path:
                yield path
            return
        # A runtime looks for such weights beside the model, and nothing lies beside memory.
        with tempfile.TemporaryDirectory(prefix="vssm-") as folder:
            for name in sorted(facts.external):
                self.copy(name, Path(folder, name))
            Path(folder, MODEL_FILE).write_bytes(shown)
            yield os.path.join(folder, MODEL_FILE)

    def model_files(self) -> list[str]:
        """The ONNX files that are listed, and those beside them that hold their weights.

        Raises:
            ArtifactError: as `read`.
        """
        onnx = sorted(_ONNX_FILES.intersection(self.manifest.files))
        beside = {name for file in onnx for name in self._read_model(file)[1].external}
        return [*onnx, *sorted(beside)]

    def read_weights(self) -> bytes:
        """weights.safetensors: the float32 weights under their official keys.

        Raises:
            ArtifactError: the export was made without them, or they were changed.
        """
        if WEIGHTS_FILE not in self.manifest.files:
            raise ArtifactError(
                f"{self.directory / WEIGHTS_FILE} is not there: the export was made with "
                "--no-weights, and this needs the model in PyTorch; export again with weights"
            )
        return self.read(WEIGHTS_FILE)


def open_artifact(
    artifact: Artifact | str | os.PathLike[str], *, only: Collection[str] | None = None
) -> Artifact:
    """Read and verify an exported directory, wherever it is now; an Artifact is verified again.

    Args:
        artifact: the export.
        only: the files to verify besides model.json; None for all.

    Raises:
        ArtifactError: it is no export, or a file's hash is not the one in model.json.
    """
    # Absolute, so that it stays the same directory if the process goes to another.
    directory = artifact.directory if isinstance(artifact, Artifact) else Path(artifact).absolute()
    settle(directory)  # of a replacement that a killed process left half done
    opened = Artifact(directory, read_manifest(directory))
    for name in sorted(opened.manifest.files if only is None else only):
        opened._verify(name)
    return opened


@contextlib.contextmanager
def _opened(artifact: Artifact, name: str, limit: int) -> Iterator[BinaryIO]:
    if name not in artifact.manifest.files:
        raise ArtifactError(
            f"file={name} is not listed in {artifact.directory}/{MANIFEST_NAME}; {_REMEDY}"
        )
    path = artifact.directory / name
    try:
        with open_regular(path, limit=limit) as file:
            yield file
    except OSError as error:
        # What the caller does inside the `with` fails here too, such as a copy on a full disk.
        if error.filename != os.fspath(path):
            raise
        raise ArtifactError(
            f"file={path} cannot be read ({error.strerror}), but {MANIFEST_NAME} lists it; "
            f"{_REMEDY}"
        ) from error


def _refuse_change(artifact: Artifact, name: str, found: str) -> None:
    expected = artifact.manifest.files[name]
    if found != expected:
        raise ArtifactError(
            f"file={artifact.directory / name} has sha256 {found[:12]}..., but {MANIFEST_NAME} "
            f"says {expected[:12]}...: it was changed or damaged; {_REMEDY}"
        )


def staged_export(
    target: str | os.PathLike[str], *, force: bool = False
) -> AbstractContextManager[Path]:
    """An empty directory to write an export into; it moves into `target` on success.

    Files in `target` that no export wrote are never touched.

    Args:
        target: the directory to write; its missing parents are made.
        force: replace the export (a `model.json`) that `target` holds.

    Raises:
        ArtifactError: `target` is no directory, holds an export and not `force`, holds a foreign
            file of the same name as a new one, or cannot be written. Nothing was changed then.
    """

    def replaceable(final: Path) -> Collection[str]:
        check_target(final, force=force)
        return _files_of_export(final)

    return staged_directory(target, replaceable=replaceable, last=MANIFEST_NAME)


def check_target(target: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse a directory that cannot take an export, before the work that makes one.

    Raises:
        ArtifactError: it is no directory, holds an export and not `force`, or a model.onnx of
            others.
    """
    final = Path(target).absolute()
    if os.path.lexists(final) and not final.is_dir():
        raise ArtifactError(f"output={final} is not a directory; name another path")
    is_export = os.path.lexists(final / MANIFEST_NAME)
    if is_export and not force:
        raise ArtifactError(
            f"output={final} already holds an export ({MANIFEST_NAME}), which is not overwritten "
            "unasked; name another directory, or pass force=True (--force) to replace it"
        )
    if not is_export and os.path.lexists(final / MODEL_FILE):
        raise ArtifactError(
            f"output={final} holds {MODEL_FILE}, which is not ours to overwrite; move it away, or "
            "name another directory"
        )


def _files_of_export(directory: Path) -> Collection[str]:
    """Names that the export in `directory` wrote: none if it holds no manifest."""
    manifest = directory / MANIFEST_NAME
    if not os.path.lexists(manifest):
        return frozenset()
    try:
        # Not `read_manifest`: an export of a newer format, or a damaged one, may be replaced too.
        listed = json.loads(read_regular(manifest, limit=JSON))["files"]
        # A name with a separator would reach outside the directory; no export writes one.
        names = {n for n in listed if n not in {".", ".."} and Path(n).name == n}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        names = set()  # A damaged manifest may be replaced; the fixed names are ours all the same.
    # An export writes files alone: a directory under a listed name is the user's.
    return EXPORT_FILES | {n for n in names if (directory / n).is_file()}
