"""Who scores blocks of images: a session of this process, or those of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from vssm.evaluation.blocks import BlockFiles, ImageBlock, write_block
from vssm.evaluation.scoring import RayOptions, Scorer, Scoring, counted
from vssm.extras import require
from vssm.runtimes.session import Session
from vssm.types import Steps


def check_ray(ray: RayOptions | None, workers: int | None) -> None:
    """Refuse options of a cluster that do not fit, before any work.

    Raises:
        ValueError: a number is out of its range, or `workers` is given beside a cluster.
        MissingPackageError: Ray is not installed.
    """
    if ray is None:
        return
    require("ray")
    ray.check()
    if workers is not None:
        raise ValueError(
            f"workers={workers} with ray={ray.address}: each actor loads its own images; ask for "
            "more actors"
        )


@contextlib.contextmanager
def open_scorer(scoring: Scoring, ray: RayOptions | None, *, workers: int) -> Iterator[Scorer]:
    """A scorer in this process, or on a cluster.

    Raises:
        As `open_session`, and `scorer_on_ray`.
    """
    if ray is not None:
        from vssm.evaluation.cluster import scorer_on_ray

        with scorer_on_ray(scoring, ray) as scorer:
            yield scorer
        return
    with scoring.open() as session:
        yield _Here(scoring, session, workers)


class _Here:
    def __init__(self, scoring: Scoring, session: Session, workers: int) -> None:
        self.info, self.actors = session.info, 0
        self._scoring, self._session, self._workers = scoring, session, workers

    def score(self, files: BlockFiles, left: Sequence[ImageBlock], progress: Steps) -> None:
        tell, done = counted(left, progress), 0
        tables = self._scoring.tables(self._session, left, workers=self._workers, tell=tell)
        for block, table in tables:
            write_block(files.folder, block.number, table)
            done += len(block.names)
            tell(done)
