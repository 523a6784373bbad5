"""`vssm predict` as a function: an export, images without classes, a Parquet row for each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.artifact.manifest import LOGITS, MANIFEST_NAME, Manifest
from vssm.artifact.preprocessing import preprocessing_of
from vssm.errors import check_least, check_several
from vssm.evaluation.blocks import BlockFiles, BlockHeader, cut, held_folder
from vssm.evaluation.classify import class_probabilities
from vssm.evaluation.data import Loaded
from vssm.evaluation.pace import Pace, refuse_unreadable
from vssm.evaluation.scorers import check_ray, open_scorer
from vssm.evaluation.scoring import RayOptions, Scoring
from vssm.evaluation.sources import ImageSource, open_source
from vssm.extras import require
from vssm.files.atomic import check_apart, check_writable, discard_unfinished, sha256_of
from vssm.files.progress import automatic, shows_progress
from vssm.runtimes.open import ENGINE_RUNTIMES, check_runtime
from vssm.runtimes.session import RuntimeInfo, Session, run_any, share_cores
from vssm.types import Array, Steps

SUFFIX: Final = ".parquet"
_OWN: Final = ("image", "classes", "probabilities", "error")
_KEPT: Final = "kept_positions_"  # before the number of a stage


@dataclass(frozen=True)
class PredictionReport:
    """What a prediction did.

    Attributes:
        info: what ran.
        source: what the images came from: "folder", "list", "tar" or "parquet".
        notes: what else was there, and was passed over.
        images: rows.
        unreadable: of these, the ones that are no readable images: name and error.
        resumed: rows that an interrupted run before had left.
        seconds: spent on the others, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
        batch: images of a run.
        block: images of a row group, which are written at once.
        workers: processes that loaded images.
        actors: sessions on a Ray cluster; 0 where this process had the only one.
        output: the Parquet file.
    """

    info: RuntimeInfo
    source: str
    notes: tuple[str, ...]
    images: int
    unreadable: tuple[tuple[str, str], ...]
    resumed: int
    seconds: float
    images_per_s: float | None
    batch: int
    block: int
    workers: int
    actors: int
    output: str


class _Header(BlockHeader):
    what = "prediction"
    option = "--output"


@dataclass(frozen=True)
class Columns:
    """What a row has beside the name of its image.

    Attributes:
        top: classes, the most likely first, and their probabilities.
        kept: names of the outputs with the positions that each stage kept.
        tensors: names of further outputs.
    """

    top: int
    kept: tuple[str, ...]
    tensors: tuple[str, ...]

    def schema(self) -> Any:
        """Of the Parquet file. All but `image` is null where there is an error."""
        import pyarrow

        numbers, reals = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
        return pyarrow.schema(
            [
                ("image", pyarrow.string()),
                ("classes", numbers),
                ("probabilities", reals),
                *((name, numbers) for name in self.kept),
                *((name, reals) for name in self.tensors),
                ("error", pyarrow.string()),
            ]
        )

    def table(self, session: Session, names: Sequence[str], loaded: Loaded) -> Any:
        """The rows of one batch; what cannot be read takes no part in the run.

        Raises:
            ValueError: logits are not finite.
        """
        import pyarrow

        outputs = run_any(session, loaded.images) if len(loaded.images) else {}
        readable = [i for i, error in enumerate(loaded.errors) if error is None]
        rows: list[dict[str, Any]] = [
            {"image": name, "error": error}
            for name, error in zip(names, loaded.errors, strict=True)
        ]
        for position, i in enumerate(readable):
            rows[i] |= self._row(names[i], {k: v[position] for k, v in outputs.items()})
        return pyarrow.Table.from_pylist(rows, schema=self.schema())

    def _row(self, name: str, outputs: dict[str, Array]) -> dict[str, Any]:
        shares = class_probabilities(outputs[LOGITS], name)
        # By logits, not by shares, which may round to 0 for several classes. Stable: the lower
        # class comes first, as argmax has it.
        top = np.argsort(-outputs[LOGITS], kind="stable")[: self.top]
        return {
            "classes": top,
            "probabilities": shares[top].astype(np.float32),
            **{kept: outputs[kept] for kept in self.kept},
            **{tensor: outputs[tensor].ravel().astype(np.float32) for tensor in self.tensors},
        }


@shows_progress
def predict(
    artifact: Artifact | str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    backend: str | None = None,
    threads: int | None = None,
    batch: int = 32,
    block: int = 1024,
    workers: int | None = None,
    top: int = 5,
    tensors: Sequence[str] = (),
    column: str | None = None,
    restart: bool = False,
    ray: RayOptions | None = None,
    progress: Steps = automatic,
) -> PredictionReport:
    """Classify many images: a Parquet row for each, in the order of the source.

    A row has the name of the image, its most likely classes with their probabilities, and what each
    pruning stage kept; or the reason why the image cannot be read. An interrupted prediction, a
    killed one too, goes on at its next call behind the last block that it wrote.

    Args:
        artifact: the export, or its directory.
        source: a folder of images; a list of files; a .tar or .parquet file, or a folder of such.
        output: the Parquet file; its blocks are in OUTPUT.blocks until all are there.
        runtime: as for `open_session`.
        backend: as for `open_session`.
        threads: as for `open_session`, but None for as many as `workers` leave cores.
        batch: images of one run.
        block: images that are written at once; what a stopped prediction loses at most.
        workers: processes that load images; 0 for this one alone; None for up to four, as many as
            `threads` leave cores.
        top: classes of a row.
        tensors: further outputs of the model to write, such as "features", flattened.
        column: of a Parquet source, where several hold bytes.
        restart: begin anew, whatever an interrupted prediction has left.
        ray: score on a Ray cluster, whose nodes see the export, the images and the output under
            the same paths; None for this process.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        TypeError: `tensors` is one text.
        ValueError: an argument does not fit, or no image can be read; their rows are written then.
        ArtifactError: the export was changed, a file cannot be written, or what an interrupted
            prediction left is of another one.
        MissingPackageError: pyarrow, or Ray for a cluster, is not installed.
        VssmError: the cluster cannot be reached, or cannot hold an actor.
        RuntimeUnavailableError, UnsupportedError: as for `open_session`.
    """
    check_least(1, batch=batch, block=block, top=top)
    check_several(tensors=tensors)
    check_runtime(runtime, backend=backend, threads=threads)
    check_ray(ray, workers)
    cores, workers = share_cores(threads, 0 if ray is not None else workers)
    # Absolute: a node of a cluster has another working directory, and rows are to be the same.
    source, target = Path(source).absolute(), Path(output).absolute()
    require("pyarrow")
    _check_target(target)
    check_apart(target, source=source)
    opened = open_artifact(artifact, only=(MODEL_FILE,))
    columns = _columns(opened.manifest, top, tensors)
    preprocessing_of(opened)  # refused now if it says nothing
    found = open_source(source, column=column)
    files = BlockFiles(
        target.with_name(f"{target.name}.blocks"),
        cut(found.names, found.places, block),
        columns.schema(),
    )
    if ray is None:
        threads = None if runtime in ENGINE_RUNTIMES else cores
    scoring = Scoring(opened, runtime, backend, threads, columns, batch)
    with open_scorer(scoring, ray, workers=workers) as scorer:
        header = _header(scoring, scorer.info, found, block)
        with held_folder(_Header, files.folder, header, restart=restart):
            # Only now: whoever holds the folder's lock is the only one that writes the results.
            discard_unfinished(target)
            left, start = files.left(), time.perf_counter()
            scorer.score(files, left, progress)
            seconds = time.perf_counter() - start
            unreadable = files.join(target)
    refuse_unreadable(unreadable, len(found.names))
    resumed = len(found.names) - sum(len(one.names) for one in left)
    pace = Pace(len(found.names), resumed, seconds)
    return PredictionReport(
        info=scorer.info,
        source=found.kind,
        notes=found.notes,
        images=len(found.names),
        unreadable=tuple(unreadable),
        resumed=pace.resumed,
        seconds=pace.seconds,
        images_per_s=pace.images_per_s,
        batch=batch,
        block=block,
        workers=workers,
        actors=scorer.actors,
        output=str(target),
    )


def _header(scoring: Scoring, info: RuntimeInfo, found: ImageSource, block: int) -> dict[str, str]:
    """All that the rows depend on; blocks under another header are refused."""
    return {
        **{key: str(value) for key, value in asdict(info).items()},
        "model": sha256_of(scoring.artifact.directory / MANIFEST_NAME),
        "images": found.fingerprint(),
        "columns": str(scoring.rows),
        "batch": str(scoring.batch),
        "block": str(block),
    }


def _columns(manifest: Manifest, top: int, tensors: Sequence[str]) -> Columns:
    if top > manifest.num_classes:
        raise ValueError(f"top={top} is above {manifest.num_classes}, the classes of the model")
    shapes = {tensor.name: tensor.shape for tensor in manifest.outputs}
    names = [*shapes]
    kept = tuple(name for name in names if name.startswith(_KEPT))
    for i, name in enumerate(tensors):
        if name not in names:
            raise ValueError(
                f"tensors={name!r} is not an output of this export; it has {', '.join(names)}"
            )
        if shapes[name][:1] != (manifest.batch,):
            raise ValueError(
                f"tensors={name!r} of shape {list(shapes[name])} has no entry for each image: "
                "leave it out"
            )
        if name in {*kept, *tensors[:i], *_OWN}:
            raise ValueError(f"tensors={name!r} is the name of another column: leave it out")
    return Columns(top, kept, tuple(tensors))


def _check_target(target: Path) -> None:
    if target.suffix != SUFFIX:
        raise ValueError(f"output={target} is to be a Parquet file; give a name in {SUFFIX}")
    check_writable(target)
