"""`vssm visualize` as a function: a model and image files to figures and a page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vssm.artifact.preprocessing import preprocess
from vssm.files.atomic import atomic_write_bytes, check_writable, make_directory
from vssm.files.json_files import write_json
from vssm.studies.subject import OpenedSubject, open_subject
from vssm.training.request import Subject

if TYPE_CHECKING:
    from vssm.models import VisionModel
    from vssm.studies.visualize_folded import Explanation

PAGE, NUMBERS = "index.html", "visualize.json"
_TOP = 3  # classes in the page's tables


def visualize(
    subject: Subject,
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    blocks: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Draw what a model keeps, scores and attends to: dense, plain removal and aligned.

    Writes `index.html`, `visualize.json` and PNG files into `output`, over those of a run before.

    Args:
        subject: the model, by its name or as the directory of an export.
        images: image files of any size, prepared as the model's evaluation does.
        output: directory to write; made where it is missing.
        blocks: whose attention is shown, counted from 1; None for those after each stage, and the
            last.
        progress: called with a line of text for every image.

    Returns:
        What visualize.json holds: "facts", and "images" with file, readout, blocks, variants and
        figure files.

    Raises:
        VssmError: matplotlib is missing, or the model cannot be shown.
        ValueError: an argument does not fit, or an image cannot be read.
        ArtifactError: a file cannot be written.
    """
    from vssm.studies.figures import require_matplotlib
    from vssm.studies.visualize_folded import explain
    from vssm.studies.visualize_html import page

    require_matplotlib()
    output, files = Path(output), [Path(file) for file in images]
    if not files:
        raise ValueError("images=[] holds no image; give one at least")
    opened = open_subject(subject)
    models = variants(opened)
    make_directory(output)
    check_writable(output / PAGE)
    found, sections = [], []
    for number, file in enumerate(files, start=1):
        progress(f"{file}: {number} of {len(files)}")
        array = preprocess(file, opened.preprocessing)
        result = explain(models, array, _picture(array, opened), blocks)
        pngs = {name: f"{number}_{file.stem}_{name}.png" for name in result.figures}
        for name, png in result.figures.items():
            atomic_write_bytes(output / pngs[name], png)
        found.append(_entry(file, result, pngs))
        sections.append((file.name, _rows(result, opened), result.figures))
    facts = _facts(opened)
    html = page(facts, sections, readout=found[0]["readout"])
    atomic_write_bytes(output / PAGE, html.encode())
    numbers = {"facts": facts, "images": found}
    write_json(output / NUMBERS, numbers)
    return numbers


def variants(subject: OpenedSubject) -> dict[str, VisionModel]:
    """Dense, plain removal and aligned, as far as the subject's schedule has them."""
    models = {"dense": subject.variant(None)}
    schedule = subject.schedule
    if schedule is not None:
        models["plain removal"] = subject.variant(schedule.changed(alignment="none"))
        if schedule.alignment != "none":
            models[f"aligned ({schedule.alignment})"] = subject.variant(schedule)
    return models


def _picture(array: Any, subject: OpenedSubject) -> Any:
    """What the model sees, (height, width, 3) in [0, 1]."""
    spec = subject.preprocessing
    pixels = array[0].transpose(1, 2, 0) * np.asarray(spec.std) + np.asarray(spec.mean)
    return np.clip(pixels, 0, 1)  # rounding alone leaves the range


def _facts(subject: OpenedSubject) -> dict[str, str]:
    schedule = subject.schedule
    blocks = {} if schedule is None else schedule.ratios
    pruned = ", ".join(f"{ratio} after block {block}" for block, ratio in blocks.items())
    facts = {"model": subject.name, "weights": subject.weights, "kept": pruned or "everything"}
    if schedule is not None:
        facts |= {"alignment": schedule.alignment, "importance": schedule.importance}
    return facts


def _entry(file: Path, result: Explanation, files: dict[str, str]) -> dict[str, Any]:
    return {
        "file": str(file),
        "readout": result.readout,
        "blocks": list(result.blocks),
        "variants": dict(result.variants),
        "figures": files,
    }


def _rows(result: Explanation, subject: OpenedSubject) -> list[list[str]]:
    """The page's table: what each variant says of the image."""
    rows = [["variant", "best classes", "kept as in the last variant, by stage"]]
    for name, numbers in result.variants.items():
        shares = numbers["probabilities"]
        best = np.argsort(-np.asarray(shares), kind="stable")[:_TOP]
        labels = [str(c) if subject.labels is None else subject.labels[c] for c in best]
        classes = ", ".join(f"{n} {shares[c]:.1%}" for n, c in zip(labels, best, strict=True))
        alike = ", ".join(f"{share:.0%}" for share in numbers["kept_as_last"])
        rows.append([name, classes, alike or "-"])
    return rows
