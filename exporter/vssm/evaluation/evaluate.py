"""`vssm evaluate` as a function: an export, a folder of images, a runtime."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.artifact.manifest_types import Preprocessing
from vssm.evaluation.data import fingerprint, open_pictures, worker_count
from vssm.evaluation.evaluate_folded import EvaluationReport, Progress, evaluate_session
from vssm.evaluation.journal import Journal
from vssm.files.atomic import (
    EXPORT_FILES,
    MANIFEST_NAME,
    check_writable,
    discard_unfinished,
    sha256_of,
)
from vssm.files.json_files import write_json
from vssm.parity.check import open_session

RESULTS_FILE = "evaluate.csv"
_OWN_FILES = (RESULTS_FILE, "evaluate.json")


def evaluate(
    artifact: Artifact | str | os.PathLike[str],
    images: str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    operators: str | None = None,
    threads: int | None = None,
    batch: int = 32,
    workers: int | None = None,
    classes: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    restart: bool = False,
    progress: Progress = lambda _: None,
) -> EvaluationReport:
    """Top-1 and top-5 accuracy of an export over a folder that holds one folder a class.

    An interrupted evaluation, a killed one too, goes on at its next call where it ended, and ends
    with the same results file. The report is written beside that, as JSON.

    Args:
        artifact: the export, or its directory.
        images: the folder, laid out as ImageNet's validation set.
        runtime: as for `open_session`.
        operators: as for `open_session`.
        threads: as for `open_session`.
        batch: images of one run.
        workers: processes that load images; 0 for this one alone; None for up to four.
        classes: file that names the folder of each class, as `read_labels` takes it; None: sorted.
        results: CSV file with a row for each image; None for evaluate.csv in the export.
        restart: begin anew, whatever an interrupted evaluation has left.
        progress: called with a line of text after every batch.

    Raises:
        ValueError: an argument is out of its range, the folders are not the classes, or no image
            can be read.
        ArtifactError: the export was changed, a file cannot be written, or what an interrupted
            evaluation left is of another one.
        RuntimeUnavailableError, UnsupportedError: as for `open_session`.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} is below 1; give the number of images of a run")
    workers = worker_count(workers)
    opened, root = open_artifact(artifact, only=(MODEL_FILE,)), Path(images)
    spec = _preprocessing(opened)
    target = opened.directory / RESULTS_FILE if results is None else Path(results)
    summary = _summary_of(target, opened)
    num_classes = int(opened.manifest.outputs[0].shape[1])
    pictures = open_pictures(root, num_classes, None if classes is None else Path(classes))
    with open_session(opened, runtime, operators=operators, threads=threads) as session:
        header = {
            **{key: str(value) for key, value in asdict(session.info).items()},
            "model": sha256_of(opened.directory / MANIFEST_NAME),
            "images": fingerprint(root, pictures),
            "batch": str(batch),
        }
        path = target.with_name(f"{target.name}.journal")
        with Journal(path, header, restart=restart) as journal:
            for file in (target, summary):
                discard_unfinished(file)
            report = evaluate_session(
                session,
                pictures,
                root=root,
                spec=spec,
                journal=journal,
                batch=batch,
                workers=workers,
                results=target,
                progress=progress,
            )
            write_json(summary, report)
            journal.remove()
    return report


def _summary_of(results: Path, artifact: Artifact) -> Path:
    """The report's file beside the results; neither may take the place of what is there."""
    if results.suffix == ".json" or not results.suffix:
        raise ValueError(
            f"results={results} is to be a CSV file, and the report goes beside it with the suffix "
            ".json; give a name that ends in .csv"
        )
    summary = results.with_suffix(".json")
    for path in (results, summary):
        check_writable(path)
        kept = {MANIFEST_NAME, *artifact.manifest.files, *EXPORT_FILES} - set(_OWN_FILES)
        if path.name in kept and path.parent.resolve() == artifact.directory.resolve():
            raise ValueError(
                f"results={results} would overwrite {path.name}, a file of the export; give another"
            )
    return summary


def _preprocessing(artifact: Artifact) -> Preprocessing:
    spec = artifact.manifest.preprocessing
    if spec is None:
        raise ValueError(
            f"{artifact.directory / MANIFEST_NAME} has no preprocessing, so image files cannot be "
            "turned into its input; export the model by its name"
        )
    return spec
