"""What is run over blocks of images, and how, in this process or in those of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vssm.artifact.directory import Artifact
from vssm.artifact.preprocessing import preprocessing_of
from vssm.errors import check_least
from vssm.evaluation.blocks import BlockFiles, ImageBlock
from vssm.evaluation.data import Loaded, load_in_order
from vssm.runtimes.open import open_session
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.types import Steps


class Rows(Protocol):
    """What a row says of an image."""

    def schema(self) -> Any:
        """Of the table: with "image", its name, and "error", why it cannot be read."""

    def table(self, session: Session, names: Sequence[str], loaded: Loaded) -> Any:
        """The rows of one batch."""


@dataclass(frozen=True)
class Scoring:
    """What is run over images, and how.

    Attributes:
        artifact: the export.
        runtime: as for `open_session`; likewise backend and threads.
        backend: see there.
        threads: see there.
        rows: what becomes of an output.
        batch: images of one run; none has images of two blocks.
    """

    artifact: Artifact
    runtime: str
    backend: str | None
    threads: int | None
    rows: Rows
    batch: int

    def open(self) -> Session:
        """A session in this process."""
        return open_session(
            self.artifact, self.runtime, backend=self.backend, threads=self.threads, spin=False
        )

    def tables(
        self,
        session: Session,
        blocks: Sequence[ImageBlock],
        *,
        workers: int,
        tell: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[ImageBlock, Any]]:
        """Each block with its table; `workers` processes load images ahead of the session.

        Within a block, `tell` is told after each batch how many images are done.

        Raises:
            VssmError: a worker was killed.
            ValueError: logits are not finite.
        """
        import pyarrow

        parts = [
            (block, slice(i, i + self.batch))
            for block in blocks
            for i in range(0, len(block.names), self.batch)
        ]
        batches = [block.places[part] for block, part in parts]
        loading = load_in_order(batches, preprocessing_of(self.artifact), workers=workers)
        done: list[Any] = []
        images = 0
        for (block, part), loaded in zip(parts, loading, strict=True):
            done.append(self.rows.table(session, block.names[part], loaded))
            images += len(block.names[part])
            if part.stop < len(block.names):
                tell(images)
            else:
                yield block, pyarrow.concat_tables(done)
                done = []


@dataclass(frozen=True)
class RayOptions:
    """Where on a cluster blocks are scored.

    Attributes:
        address: "auto", the cluster that this machine is in; HOST:PORT; or "local", started here.
        actors: sessions; None for as many as the cluster's CPUs and GPUs hold.
        gpus: of an actor; a part of one where several actors share it.
    """

    address: str = "auto"
    actors: int | None = None
    gpus: float = 0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: a number is out of its range.
        """
        check_least(1, actors=self.actors)
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"gpus={self.gpus} is neither in [0, 1] nor a whole number")


def counted(blocks: Sequence[ImageBlock], progress: Steps) -> Callable[[int], None]:
    """What is told how many images of some blocks are done; none are at first."""
    images = sum(len(block.names) for block in blocks)

    def tell(done: int) -> None:
        progress("scoring images", done, images)

    tell(0)
    return tell


class Scorer(Protocol):
    """Who scores blocks: this process, or a cluster.

    Attributes:
        info: what runs.
        actors: sessions on a cluster; 0 for this process.
    """

    info: RuntimeInfo
    actors: int

    def score(self, files: BlockFiles, left: Sequence[ImageBlock], progress: Steps) -> None:
        """Write the files of the blocks that are left."""
