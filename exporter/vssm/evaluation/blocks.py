"""Images cut into blocks, and their results on disk: a Parquet file each until all are there.

A block is what is computed, written and, after a stop, found again as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vssm.errors import ArtifactError
from vssm.evaluation.sources import Place
from vssm.files.atomic import atomic_path, make_directory
from vssm.files.journal import JsonJournal


@dataclass(frozen=True)
class ImageBlock:
    """Some of a source's images: their names for results, and where they are."""

    number: int
    names: tuple[str, ...]
    places: tuple[Place, ...]


def cut(names: Sequence[str], places: Sequence[Place], size: int) -> list[ImageBlock]:
    """Blocks of `size` images; the last one has the rest."""
    starts = range(0, len(names), size)
    return [
        ImageBlock(number, tuple(names[i : i + size]), tuple(places[i : i + size]))
        for number, i in enumerate(starts)
    ]


class BlockHeader(JsonJournal[None]):
    """Says of which run the blocks beside it are, and keeps other processes from them.

    A subclass says for messages what runs and which option moves it.
    """

    @staticmethod
    def to_json(entry: None) -> Any:
        """There are no entries: the blocks themselves say what is done."""
        raise AssertionError(entry)

    @staticmethod
    def from_json(document: Any) -> None:
        """There are no entries."""
        raise ValueError(f"it holds {document!r}, which is not a header")

    def begun(self) -> bool:
        """Whether there is a block that another run would lose."""
        return any(self.path.parent.glob("[0-9]*.parquet"))


@dataclass(frozen=True)
class BlockFiles:
    """The results of blocks, in a folder beside the file that they become.

    Attributes:
        folder: where they are.
        blocks: all that there will be.
        schema: of their tables, which have a column "image" and a column "error".
    """

    folder: Path
    blocks: Sequence[ImageBlock]
    schema: Any

    def path(self, block: ImageBlock) -> Path:
        """The file of a block."""
        return block_file(self.folder, block.number)

    def left(self) -> list[ImageBlock]:
        """The blocks that are not on disk, or not whole."""
        return [block for block in self.blocks if not self._is_done(block)]

    def _is_done(self, block: ImageBlock) -> bool:
        import pyarrow
        import pyarrow.parquet

        if not self.path(block).exists():
            return False
        try:
            # A torn file has no footer and cannot be opened.
            with pyarrow.parquet.ParquetFile(self.path(block)) as file:
                found = file.read(columns=["image"]).column(0).to_pylist()
        except (OSError, pyarrow.ArrowException):
            return False
        return bool(found == list(block.names))

    def tables(self) -> Iterator[Any]:
        """The results of all blocks, in order."""
        import pyarrow.parquet

        for block in self.blocks:
            with pyarrow.parquet.ParquetFile(self.path(block)) as file:
                yield file.read().cast(self.schema)

    def join(self, target: Path) -> list[tuple[str, str]]:
        """Write all blocks as one file, a row group each; gives the images with an error.

        Raises:
            ArtifactError: it cannot be written.
        """
        import pyarrow.compute
        import pyarrow.parquet

        unread: list[tuple[str, str]] = []
        with (
            atomic_path(target) as temporary,
            pyarrow.parquet.ParquetWriter(temporary, self.schema) as writer,
        ):
            for table in self.tables():
                writer.write_table(table)
                bad = table.filter(pyarrow.compute.is_valid(table["error"]))
                unread += zip(bad["image"].to_pylist(), bad["error"].to_pylist(), strict=True)
        return unread


def block_file(folder: Path, number: int) -> Path:
    """The file of a block."""
    return folder / f"{number:06}.parquet"


def write_block(folder: Path, number: int, table: Any) -> None:
    """Put the results of a block on disk, whole or not at all.

    Raises:
        ArtifactError: they cannot be written.
    """
    import pyarrow.parquet

    with atomic_path(block_file(folder, number)) as temporary:
        pyarrow.parquet.write_table(table, temporary)


@contextlib.contextmanager
def held_folder(
    kind: type[BlockHeader], folder: Path, header: Mapping[str, str], *, restart: bool
) -> Iterator[None]:
    """Hold a folder of blocks for one run; they go at the end of a run that had no error.

    Raises:
        ArtifactError: the blocks there are of another run, another process is at it, or it cannot
            be written.
    """
    make_directory(folder)
    path = folder / "run.journal"
    if not path.exists() and any(folder.iterdir()) and not restart:
        raise ArtifactError(
            f"path={folder} holds files, but not {path.name}, which would say of which run they "
            "are; remove it, or begin anew with --restart"
        )
    with kind(path, header, restart=restart) as journal:
        if restart:
            _remove_blocks(folder)
        yield
        # The journal last: killed before, the next call still knows whose the blocks are.
        _remove_blocks(folder)
        journal.remove()
    with contextlib.suppress(OSError):  # somebody else's file in it stays
        folder.rmdir()


def _remove_blocks(folder: Path) -> None:
    """Delete blocks, and what killed processes left of writing one."""
    for pattern in ("[0-9]*.parquet", ".[0-9]*.parquet.vssm-*"):
        for file in folder.glob(pattern):
            file.unlink()
