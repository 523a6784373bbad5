"""Images without classes: a folder, a list of files, tar shards as WebDataset has them, Parquet.

A source is an index of where each image lies. What lies inside other files is found by offset or
row when it is wanted, so that any process can read any image, and no archive is unpacked.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import decode_rgb, image_files
from vssm.files.regular import WEIGHTS, open_regular, read_regular
from vssm.files.text import shown

_TAR: Final = ".tar"
_PARQUET: Final = ".parquet"
_LISTS: Final = (".txt", ".lst")
# Shards hold labels and texts beside the images, under the same key.
_IMAGE_ENDINGS: Final = frozenset(
    [".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
_MAX_LIST: Final = 1 << 30  # bytes
_MAX_BYTES: Final = 1 << 30  # of one image, as of an image file
_BYTES_FIELD: Final = "bytes"  # of a struct column, as Hugging Face's data sets have it


@dataclass(frozen=True, slots=True)
class TarMember:
    """An image in an uncompressed tar file: its bytes from `start` on."""

    name: str
    file: str
    start: int
    size: int

    def decoded(self, spec: Preprocessing) -> Image.Image:
        """The image in RGB.

        Raises:
            ValueError: it cannot be read.
        """
        if self.size > _MAX_BYTES:
            raise ValueError(f"image={self.name} has {self.size:,} bytes, too many for an image")
        with _opened(self.file, self.name) as file:
            file.seek(self.start)
            return decode_rgb(io.BytesIO(file.read(self.size)), f"image={self.name}", spec)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """An image in a Parquet file: a row of one of its row groups."""

    name: str
    file: str
    column: str
    group: int
    row: int

    def decoded(self, spec: Preprocessing) -> Image.Image:
        """The image in RGB.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            cell = _row_group(self.file, self.group, self.column)[self.row].as_py()
        except OSError as error:
            raise ValueError(f"image={self.name} cannot be read ({error})") from error
        data = cell.get(_BYTES_FIELD) if isinstance(cell, dict) else cell
        if data is None:
            raise ValueError(f"image={self.name} has no bytes in the column {self.column!r}")
        return decode_rgb(io.BytesIO(data), f"image={self.name}", spec)


Place = str | TarMember | ParquetCell
_Found = tuple[Sequence[TarMember | ParquetCell], int]


@dataclass(frozen=True)
class ImageSource:
    """Images in an order that does not change.

    Attributes:
        kind: "folder", "list", "tar" or "parquet".
        names: of the images, for results: paths below the folder, lines of the list,
            SHARD.tar/MEMBER, or FILE.parquet#ROW.
        places: where each of them is: a path, or a part of a file.
        notes: what else is there that one should know.
    """

    kind: str
    names: tuple[str, ...]
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 over names, places and the sizes of files; a link to nothing has size -1."""
        digest = hashlib.sha256()
        size = functools.lru_cache(maxsize=None)(_size)
        for name, place in zip(self.names, self.places, strict=True):
            file = place if isinstance(place, str) else place.file
            digest.update(f"{name}\0{place}\0{size(file)}\n".encode())
        return digest.hexdigest()


def open_source(source: Path, *, column: str | None = None) -> ImageSource:
    """Find the images of a folder, list file, tar file or Parquet file, or of a folder of shards.

    Args:
        source: a folder of images, or of .tar or .parquet files alone; a .txt or .lst file with a
            path a line, relative ones from its own folder; a .tar or .parquet file.
        column: of Parquet files, where there are several that hold bytes.

    Raises:
        ValueError: it is none of these, cannot be read, or holds no image.
        MissingPackageError: a Parquet file without pyarrow.
    """
    if not source.exists():
        raise ValueError(f"source={source} is not there; give a folder, a list, .tar or .parquet")
    files = image_files(source) if source.is_dir() else [source]
    endings = {file.suffix.lower() for file in files}
    shards = endings & {_TAR, _PARQUET}
    if len(endings) > 1 and shards:
        raise ValueError(
            f"source={source} holds {' and '.join(sorted(shards))} files beside others, so it is "
            "not certain what the images are; give a folder of one kind"
        )
    kind = "folder" if source.is_dir() else "file"
    if shards:
        kind = shards.pop().lstrip(".")
    elif endings & {*_LISTS} and not source.is_dir():
        kind = "list"
    if column is not None and kind != "parquet":
        raise ValueError(f"column={column!r} with source={source}, no Parquet: leave it out")
    readers: dict[str, Callable[[], ImageSource]] = {
        "folder": lambda: _folder(source, files),
        "list": lambda: _listed(source),
        "tar": lambda: _shards(source, files, _members, "tar"),
        "parquet": lambda: _shards(
            source, files, functools.partial(_cells, column=column), "parquet"
        ),
    }
    if kind not in readers:
        raise ValueError(
            f"source={source} is not a folder, list (.txt, .lst), .tar or .parquet file; for "
            "single images use `vssm run`, or name them in a list"
        )
    found = readers[kind]()
    _check(source, found)
    return found


def _check(source: Path, found: ImageSource) -> None:
    if not found.names:
        raise ValueError(f"source={source} holds no images; give one that does")
    for name in found.names:
        # Python reads each byte of a file name that it cannot decode as a lone surrogate.
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(
                f"source={source} holds {name!r}, whose name is no UTF-8 and cannot be written "
                "into results; rename it"
            )


def _folder(source: Path, files: Sequence[Path]) -> ImageSource:
    names = tuple(file.relative_to(source).as_posix() for file in files)
    return ImageSource("folder", names, tuple(map(str, files)))


def _listed(source: Path) -> ImageSource:
    try:
        text = read_regular(source, limit=_MAX_LIST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"source={source} cannot be read ({error}); give a UTF-8 text file, one path a line"
        ) from error
    # Not splitlines(), which also splits at characters that a path may hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    names = tuple(line for line in lines if line)
    # Absolute, since another process may have another working directory.
    home = source.absolute().parent
    return ImageSource("list", names, tuple(str(home / name) for name in names))


def _shards(
    source: Path, files: Sequence[Path], read: Callable[[Path, str], _Found], kind: str
) -> ImageSource:
    """The images of all shards, one after another."""
    images: list[TarMember | ParquetCell] = []
    others = 0  # members of other kinds
    for file in files:
        name = file.name if file == source else file.relative_to(source).as_posix()
        found, passed_over = read(file, name)
        images += found
        others += passed_over
    notes = (f"{others:,} members that are no images by their names are passed over",)
    return ImageSource(
        kind, tuple(image.name for image in images), tuple(images), notes if others else ()
    )


def _members(file: Path, name: str) -> _Found:
    """The images of a tar file, and how many other files are in it."""
    found: list[TarMember] = []
    others = 0
    with _opened(str(file), str(file), what="source") as raw:
        try:
            # "r:" takes no compressed file: its members could not be found by offset.
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for member in _files_of(archive):
                    if os.path.splitext(member.name)[1].lower() not in _IMAGE_ENDINGS:
                        others += 1
                        continue
                    found.append(
                        TarMember(
                            f"{name}/{member.name}", str(file), member.offset_data, member.size
                        )
                    )
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(
                f"source={file} cannot be read as an uncompressed tar file ({shown(error)}); "
                "unpack it with gunzip or zstd -d, or download it again"
            ) from error
    return found, others


def _files_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        # Neither a folder nor a link; and no file with holes, whose bytes do not lie in one piece.
        if member.isreg() and not member.issparse():
            yield member


def _cells(file: Path, name: str, *, column: str | None) -> _Found:
    """The rows of a Parquet file."""
    parquet = _open_parquet(str(file))
    held = _bytes_column(file, parquet.schema_arrow, column)
    cells: list[ParquetCell] = []
    for group in range(parquet.metadata.num_row_groups):
        for row in range(parquet.metadata.row_group(group).num_rows):
            cells.append(ParquetCell(f"{name}#{len(cells)}", str(file), held, group, row))
    return cells, 0


def _bytes_column(file: Path, schema: Any, column: str | None) -> str:
    """The one column that holds bytes, or the one that was asked for."""
    held = [field.name for field in schema if _holds_bytes(field.type)]
    if column is not None and column not in held:
        raise ValueError(
            f"column={column!r} of source={file} holds no bytes, or is not there; "
            + (f"these do: {', '.join(map(shown, held))}" if held else "no column does")
        )
    if column is None and len(held) != 1:
        which = f"the columns {', '.join(map(shown, held))} do: say --column" if held else "none"
        raise ValueError(
            f"source={file} is to have one column of image bytes (binary, or a struct with "
            f"`bytes`), but {which}"
        )
    return held[0] if column is None else column


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index(_BYTES_FIELD)
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _open_parquet(file: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    # Looked at first: pyarrow would wait for a named pipe without end.
    _opened(file, file, what="source").close()
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"source={file} cannot be read as a Parquet file ({shown(error)}); write it again"
        ) from error


# One row group: images are asked for in their order, and a group may be as large as the memory.
@functools.lru_cache(maxsize=1)
def _row_group(file: str, group: int, column: str) -> Any:
    return _open_parquet(file).read_row_group(group, columns=[column]).column(0)


def _opened(file: str, name: str, *, what: str = "image") -> Any:
    try:
        return open_regular(file, limit=WEIGHTS)
    except OSError as error:
        raise ValueError(f"{what}={name} cannot be read ({error.strerror})") from error


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
