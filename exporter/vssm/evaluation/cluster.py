"""Blocks of images scored on a Ray cluster by Ray Data: a session in each actor.

Actors read the images themselves, from storage that all nodes see under one path: a block is some
names and places on its way to an actor, and its rows on the way to the task that writes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasink

from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.artifact.manifest import MANIFEST_NAME
from vssm.errors import ArtifactError, VssmError
from vssm.evaluation.blocks import BlockFiles, ImageBlock, block_file, write_block
from vssm.evaluation.scoring import RayOptions, Scorer, Scoring, counted
from vssm.files.atomic import sha256_of
from vssm.runtimes.open import ENGINE_RUNTIMES
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.types import Steps

_SECONDS: Final = 1.0  # between two looks at how many blocks are there
_NUMBER, _SIZE = "_block", "_rows"  # columns on the way to the file
_ACTORS_A_WRITER: Final = 8  # to write a block takes some milliseconds
_AHEAD: Final = 2  # blocks that an actor has, the one that it is at included


@dataclass(frozen=True)
class _Job:
    """What an actor needs to know."""

    scoring: Scoring
    model: str  # SHA-256 of model.json

    def open(self) -> Session:
        """A session, of the same export as the driver's."""
        # Opened anew: a node may see another directory under this path.
        directory = self.scoring.artifact.directory.absolute()
        artifact = open_artifact(directory, only=(MODEL_FILE,))
        if sha256_of(directory / MANIFEST_NAME) != self.model:
            raise ArtifactError(
                f"directory={directory} on node {ray.util.get_node_ip_address()} is another export "
                "than the driver's; all nodes must see the same storage"
            )
        return replace(self.scoring, artifact=artifact).open()


@contextlib.contextmanager
def scorer_on_ray(scoring: Scoring, options: RayOptions) -> Iterator[Scorer]:
    """A scorer of a cluster, which is asked once whether it can run the export.

    Raises:
        VssmError: the cluster cannot be reached, or no node of it can hold an actor.
        RuntimeUnavailableError, UnsupportedError: as for `open_session`, on a node.
    """
    ours = not ray.is_initialized()
    if ours:
        # Ray reports its use over the network unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise VssmError(
                f"ray={options.address}: no cluster can be reached there ({error}); start one with "
                "`ray start --head`, or give local"
            ) from error
    try:
        yield _OnRay(scoring, options)
    finally:
        if ours:
            ray.shutdown()


class _OnRay:
    def __init__(self, scoring: Scoring, options: RayOptions) -> None:
        if scoring.runtime not in ENGINE_RUNTIMES:
            # Every actor would take all cores of its node.
            scoring = replace(scoring, threads=scoring.threads or 1)
        self._job = _Job(scoring, sha256_of(scoring.artifact.directory / MANIFEST_NAME))
        self._needs = {"num_cpus": scoring.threads or 1, "num_gpus": options.gpus}
        room = self._room()
        self.actors = options.actors or room
        with _own_errors():
            self.info: RuntimeInfo = ray.get(ray.remote(**self._needs)(_examine).remote(self._job))

    def _room(self) -> int:
        """How many actors the nodes that are there can hold."""
        wanted = [("CPU", self._needs["num_cpus"]), ("GPU", self._needs["num_gpus"])]
        room = sum(
            min(int(node["Resources"].get(kind, 0) // n) for kind, n in wanted if n)
            for node in ray.nodes()
            if node["Alive"]
        )
        if not room:
            raise VssmError(
                f"ray: no node has {self._needs['num_cpus']} CPUs and {self._needs['num_gpus']} "
                "GPUs, which an actor takes; start one, or ask for fewer --threads or --ray-gpus"
            )
        return room

    def score(self, files: BlockFiles, left: Sequence[ImageBlock], progress: Steps) -> None:
        if not left:
            return
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A block must reach its file whole.
        context.target_max_block_size = None
        with (
            DataContext.current(context),
            _quiet(),
            _watched(files.folder, left, progress),
            _own_errors(),
        ):
            blocks = [pyarrow.table({"block": [pickle.dumps(block)]}) for block in left]
            ray.data.from_arrow(blocks).map_batches(
                _Actor,
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=min(self.actors, len(left)), max_tasks_in_flight_per_actor=_AHEAD
                ),
                fn_constructor_args=(self._job,),
                **self._needs,
            ).write_datasink(
                _BlockSink(files.folder, files.schema),
                # Without a CPU of its own, as actors may hold all of them; and bounded, since Ray
                # starts a process for each task that takes nothing.
                ray_remote_args={"num_cpus": 0},
                concurrency=max(1, self.actors // _ACTORS_A_WRITER),
            )


def _examine(job: _Job) -> RuntimeInfo:
    with job.open() as session:
        return session.info


class _Actor:
    """A session of a process of the cluster."""

    def __init__(self, job: _Job) -> None:
        self._scoring, self._session = job.scoring, job.open()

    def __call__(self, batch: Any) -> Iterator[Any]:
        blocks = [pickle.loads(cell.as_py()) for cell in batch["block"]]
        for block, table in self._scoring.tables(self._session, blocks, workers=0):
            number, size = [block.number] * len(table), [len(table)] * len(table)
            yield table.append_column(_NUMBER, [number]).append_column(_SIZE, [size])


class _BlockSink(Datasink):  # type: ignore[misc]
    """Each block to its file, whole: what runs twice, as after a fault, writes the same again."""

    def __init__(self, folder: Path, schema: Any) -> None:
        self._folder, self._schema = folder, schema

    def write(self, blocks: Iterable[Any], ctx: object) -> None:
        """Called by Ray Data in a task, with the tables of one or several blocks."""
        for table in blocks:
            for number in table[_NUMBER].unique().to_pylist():
                rows = table.filter(pyarrow.compute.field(_NUMBER) == number)
                if len(rows) != rows[_SIZE][0].as_py():
                    raise VssmError(f"ray: block {number} came in parts; take a smaller --block")
                write_block(
                    self._folder, number, rows.select(self._schema.names).cast(self._schema)
                )


@contextlib.contextmanager
def _watched(folder: Path, left: Sequence[ImageBlock], progress: Steps) -> Iterator[None]:
    """Tell now and then how many images of the blocks that were left are done."""
    tell, over = counted(left, progress), threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS):
            there = (b for b in left if block_file(folder, b.number).exists())
            tell(sum(len(b.names) for b in there))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray Data's log of errors, which are raised as well."""
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Errors of ours that Ray has wrapped, as themselves."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            # Ray's wrapper is an instance of both classes, with the text of all its frames.
            if isinstance(cause, VssmError | ValueError) and not isinstance(
                cause, ray.exceptions.RayError
            ):
                raise cause from error
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise VssmError(f"ray: {str(error).strip().splitlines()[-1]}") from error
