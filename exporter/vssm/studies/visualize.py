"""`vssm visualize` as a function: a model and image files to figures and a page."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vssm.artifact.preprocessing import preprocess
from vssm.errors import check_several
from vssm.extras import require
from vssm.files.atomic import atomic_write_bytes, check_writable, make_directory
from vssm.files.json import write_json
from vssm.files.page import Table, render
from vssm.files.progress import automatic, shows_progress
from vssm.models.base import VisionModel
from vssm.models.dense.base import DenseModel
from vssm.pruning.schedule import MergeSchedule, MergeStage, PruneSchedule
from vssm.runtimes.torch import torch_threads
from vssm.studies.figures import (
    Walk,
    attention_figure,
    importance_figure,
    kept_figure,
    left_figure,
    merged_figure,
    section,
    walks_figure,
)
from vssm.studies.source import LoadedSource, load_source
from vssm.studies.trace import Block, Trace, trace
from vssm.training.request import ModelSource
from vssm.types import Array, Steps

_EVEN = 4  # blocks shown of a model that prunes nothing
_UNIT = "% of the weight"
# What a dense head reads at a pruned position, by the schedule's `restore`.
_SHOWS = {
    "frozen": "the token as it left (frozen)",
    "zero": "zero",
    "nearest": "the nearest kept token",
}


@dataclass(frozen=True)
class Explanation:
    """The figures of one image, PNG by name, and its numbers.

    Attributes:
        figures: "kept" (pruned models) or "merged" (those that merge), "left" (pruned segmenters),
            "importance", "attention", "directions", "walks".
        readout: what attends: "class token" or "mean over tokens".
        blocks: the blocks whose attention is shown.
        variants: by variant: "probabilities" of all classes (of a segmenter, their mean over the
            places), "kept_positions" by stage,
            "kept_as_last", the share of each stage's choice that the last variant also keeps, and
            "merged", the original positions that are one token at the end, where several are.
    """

    figures: Mapping[str, bytes]
    readout: str
    blocks: Sequence[int]
    variants: Mapping[str, Mapping[str, Any]]


def explain(
    models: Mapping[str, VisionModel],
    images: Array,
    picture: Array,
    blocks: Sequence[int] | None = None,
) -> Explanation:
    """Trace the variants on one image.

    Args:
        models: by name, dense first, the one of interest last; the same weights.
        images: (1, 3, height, width) float32, preprocessed.
        picture: (height, width, 3) in [0, 1], the same to look at.
        blocks: whose attention is shown; None for the blocks after each stage, and the last.

    Raises:
        ValueError: a block lies outside the model.
        UnsupportedError: as for `trace`.
    """
    traces = {name: trace(model, torch.from_numpy(images)) for name, model in models.items()}
    *_, last = models.values()
    *_, told = traces.values()
    shown = (
        _checked(blocks, len(told.blocks)) if blocks else _default_blocks(last, len(told.blocks))
    )
    readout = "class token" if told.blocks[0].class_positions else "mean over tokens"
    position = "output at the class token" if readout == "class token" else readout
    title = f"What every token weighs in the scan's {position}"
    split = f"{title},\nby direction, block {shown[-1]}"
    by_direction = _by_direction(traces, shown[-1])
    figures = {
        "importance": importance_figure(
            picture, _importance(told, last.stages), variant=list(models)[-1]
        ),
        "attention": attention_figure(picture, _attention(traces, shown), unit=_UNIT, title=title),
        "directions": attention_figure(picture, by_direction, unit=_UNIT, title=split),
        "walks": walks_figure(
            picture, [_walks(told.blocks[i]) for i in _ends(told)], told.blocks[-1].grid
        ),
    }
    if isinstance(last.schedule, MergeSchedule):
        figures = {"merged": merged_figure(picture, _merged(last, told)), **figures}
    elif last.stages:
        kept = {n: _kept(models[n], t) for n, t in traces.items() if models[n].stages}
        figures = {"kept": kept_figure(picture, kept), **figures}
        if isinstance(last, DenseModel) and last.schedule is not None:
            left = {name: _left(models[name], traces[name]) for name in kept}
            shows = _SHOWS[last.schedule.restore]
            figures["left"] = left_figure(picture, left, shows=shows)
    numbers = {n: _numbers(models[n], t, told) for n, t in traces.items()}
    return Explanation(figures, readout, shown, numbers)


def _checked(blocks: Sequence[int], depth: int) -> list[int]:
    for block in blocks:
        if not 1 <= block <= depth:
            raise ValueError(
                f"block={block} is outside the model's blocks 1 to {depth}; name blocks of it"
            )
    return sorted(set(blocks))


def _default_blocks(model: VisionModel, depth: int) -> list[int]:
    if not model.stages:
        return sorted({max(1, round(depth * (i + 1) / _EVEN)) for i in range(_EVEN)})
    # The block after a stage is the first that lacks what it pruned.
    return sorted({min(block + 1, depth) for block in _some(list(model.stages))} | {depth})


def _some(stages: Sequence[int]) -> list[int]:
    """At most `_EVEN` of the stages' blocks, evenly, the last among them."""
    count = min(_EVEN, len(stages))
    return [stages[round(len(stages) * (i + 1) / count) - 1] for i in range(count)]


def _ends(told: Trace) -> list[int]:
    """First and last block of the last map size: the walks are the same over all of these."""
    same = [i for i, block in enumerate(told.blocks) if block.grid == told.blocks[-1].grid]
    pruned = told.blocks[same[0]].position.shape != told.blocks[-1].position.shape
    return [same[0], same[-1]] if pruned else [same[-1]]


def _importance(told: Trace, stages: Container[int]) -> list[tuple[str, Array]]:
    return [
        (f"block {b.number}{', prunes' * (b.number in stages)}", _map(b, b.importance()))
        for b in told.blocks
    ]


def _attention(traces: Mapping[str, Trace], shown: Sequence[int]) -> dict[str, dict[str, Array]]:
    """The share of every token in percent, directions together."""
    return {
        f"block {number}": {
            name: _map(block := t.blocks[number - 1], _share(block.attention()).sum(1))
            for name, t in traces.items()
        }
        for number in shown
    }


def _by_direction(traces: Mapping[str, Trace], number: int) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for name, t in traces.items():
        block = t.blocks[number - 1]
        share = _share(block.attention())
        found[name] = {
            title: _map(block, share[:, k]) for k, title in enumerate(_titles(share.shape[1]))
        }
    return found


def _titles(directions: int) -> list[str]:
    if directions == 2:
        return ["forward", "backward"]
    return [f"direction {k + 1}" for k in range(directions)]


def _share(attention: Tensor) -> Tensor:
    """Attention (batch, directions, seqlen) in percent of an image's sum."""
    return 100 * attention / attention.sum((1, 2), keepdim=True)


def _map(block: Block, values: Tensor) -> Array:
    return block.on_grid(values)[0].numpy()


def _kept(model: VisionModel, told: Trace) -> list[tuple[str, Array]]:
    """Each stage's title and which patches it left."""
    found = []
    for number, stage in model.stages.items():
        kept = told.details.kept_positions[stage.index]
        present = told.blocks[number - 1]
        # Only to lay positions out on the grid: none of its scans is asked.
        left = Block(number, present.grid, present.class_positions, kept, ())
        here = ~np.isnan(_map(left, torch.ones(kept.shape)))
        found.append((f"after block {number}: {here.sum()} of {here.size}", here))
    return found


def _left(model: VisionModel, told: Trace) -> Array:
    """The block after which each patch's token left; NaN where it is kept to the end."""
    whole = told.blocks[0]
    left = torch.full(whole.position.shape, torch.nan, dtype=torch.float64)
    present = torch.ones(whole.position.shape, dtype=torch.bool)
    for number, stage in model.stages.items():
        kept = told.details.kept_positions[stage.index]
        here = torch.zeros_like(present).scatter(1, kept, value=True)
        left[present & ~here] = number
        present = here
    return _map(whole, left)


def _owners(model: VisionModel, told: Trace) -> dict[int, Array]:
    """After each stage, of each position the position of the token it is in; -1 where it went."""
    owner = position = told.blocks[0].position[0].numpy()
    merges, found = iter(told.details.merges), {}
    for number, stage in model.stages.items():
        kept = told.details.kept_positions[stage.index][0].numpy()
        if isinstance(stage, MergeStage):
            pairs = position[next(merges).pairs[0].numpy()]
            joined = {} if stage.schedule.mode == "drop" else dict(pairs.tolist())
            owner = np.array([joined.get(p, p) for p in owner.tolist()])
        owner = np.where(np.isin(owner, kept), owner, -1)
        found[number], position = owner, kept
    return found


def _merged(model: VisionModel, told: Trace) -> list[tuple[str, Array]]:
    """The title of some of the stages and which token each patch is in."""
    owners, whole = _owners(model, told), told.blocks[0]
    return [
        (
            f"after block {number}: {model.stages[number].num_keep} tokens",
            _map(whole, torch.from_numpy(owners[number])[None]).astype(int),
        )
        for number in _some(list(model.stages))
    ]


def _walks(block: Block) -> list[Walk]:
    """Every direction of a block's scans."""
    rows, columns = block.grid
    patch = torch.arange(rows * columns)
    values = torch.full((rows * columns + len(block.class_positions),), -1)
    is_patch = torch.ones(len(values), dtype=torch.bool)
    is_patch[list(block.class_positions)] = False
    values[is_patch] = patch
    present = values[block.position[0]].double()
    # NaN, where a class token stands, breaks the line; integers have none, so doubles.
    present[present < 0] = torch.nan
    orders = torch.cat([scan.order[:1].long() for scan in block.scans], dim=1)[0]
    gaps = torch.cat([scan.gap[:1].long() for scan in block.scans], dim=1)[0]
    found = []
    for title, order, gap in zip(_titles(len(orders)), orders, gaps, strict=True):
        position = present[order].numpy()
        name = f"block {block.number}, {title}"
        found.append(Walk(name, position // columns, position % columns, gap.numpy()))
    return found


def _numbers(model: VisionModel, told: Trace, last: Trace) -> dict[str, Any]:
    *_, owner = (*_owners(model, told).values(),) or (np.arange(0),)
    groups = (np.flatnonzero(owner == token).tolist() for token in np.unique(owner[owner >= 0]))
    kept = [k[0].tolist() for k in told.details.kept_positions]
    reference = [set(k[0].tolist()) for k in last.details.kept_positions]
    shares = torch.softmax(told.details.logits[0].double(), 0)
    return {
        # Of a segmenter, the mean over the places.
        "probabilities": shares.flatten(1).mean(1).tolist()
        if shares.dim() > 1
        else shares.tolist(),
        "kept_positions": kept,
        # Not strict: the dense model has no stages to compare.
        "kept_as_last": [len(r & set(k)) / len(k) for k, r in zip(kept, reference, strict=False)],
        "merged": [group for group in groups if len(group) > 1],
    }


PAGE, NUMBERS = "index.html", "visualize.json"
_TOP = 3  # classes in the page's tables


@shows_progress
def visualize(
    source: ModelSource,
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    blocks: Sequence[int] | None = None,
    threads: int | None = None,
    progress: Steps = automatic,
) -> dict[str, Any]:
    """Draw what a model keeps, scores and attends to: dense, plain removal and aligned.

    Writes `index.html`, `visualize.json` and PNG files into `output`, over those of a run before.

    Args:
        source: the model, by its name or as the directory of an export.
        images: image files of any size, prepared as the model's evaluation does.
        output: directory to write; made where it is missing.
        blocks: whose attention is shown, counted from 1; None for those after each stage, and the
            last.
        threads: of torch; None leaves their number as it is.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Returns:
        What visualize.json holds: "facts", and "images" with file, readout, blocks, variants and
        figure files.

    Raises:
        VssmError: matplotlib is missing, or the model cannot be shown.
        TypeError: `images` is one path.
        ValueError: an argument does not fit, or an image cannot be read.
        ArtifactError: a file cannot be written.
    """
    require("matplotlib")
    require("jinja2")
    check_several(images=images)
    output, files = Path(output), [Path(file) for file in images]
    if not files:
        raise ValueError("images=[] holds no image; give one at least")
    opened = load_source(source, ("classification", "segmentation"))
    # All of them before the first is drawn: a file that is no image is said at once.
    arrays = [preprocess(file, opened.preprocessing) for file in files]
    models = variants(opened)
    for model in models.values():
        _checked(blocks or (), model.traced_blocks)
    make_directory(output)
    check_writable(output / PAGE)
    found, sections = [], []
    for number, (file, array) in enumerate(zip(files, arrays, strict=True), start=1):
        progress("drawing images", number - 1, len(files), file.name)
        with torch_threads(threads):
            result = explain(models, array, _picture(array, opened), blocks)
        # Numbered, as two folders may have a file of the same name.
        pngs = {name: f"{number}_{file.stem}_{name}.png" for name in result.figures}
        for name, png in result.figures.items():
            atomic_write_bytes(output / pngs[name], png)
        found.append(_entry(file, result, pngs))
        table = _table(result, opened)
        sections.append(section(file.name, table, result.figures, readout=result.readout))
    progress("drawing images", len(files), len(files))
    facts = _facts(opened)
    # After the figures: who finds the page finds all that it shows.
    atomic_write_bytes(output / PAGE, render("vssm visualize", facts, sections).encode())
    numbers = {"facts": facts, "images": found}
    write_json(output / NUMBERS, numbers)
    return numbers


def variants(source: LoadedSource) -> dict[str, VisionModel]:
    """Dense, and plain removal and aligned, or merged, as the model's schedule has them."""
    models = {"dense": source.variant(None)}
    schedule = source.schedule
    # Three views of one set of weights, so that only the schedule differs.
    if isinstance(schedule, MergeSchedule):
        models[f"merged, alignment {schedule.alignment}"] = source.variant(schedule)
    elif schedule is not None:
        models["plain removal"] = source.variant(schedule.changed(alignment="none"))
        # Else it would be plain removal once more.
        if schedule.alignment != "none":
            models[f"aligned ({schedule.alignment})"] = source.variant(schedule)
    return models


def _picture(array: Any, source: LoadedSource) -> Any:
    """What the model sees, (height, width, 3) in [0, 1]."""
    spec = source.preprocessing
    pixels = array[0].transpose(1, 2, 0) * np.asarray(spec.std) + np.asarray(spec.mean)
    return np.clip(pixels, 0, 1)  # rounding alone leaves the range


def _facts(source: LoadedSource) -> dict[str, str]:
    schedule = source.schedule
    kept = "everything" if schedule is None else schedule.describe()
    facts = {"model": source.name, "weights": source.weights, "kept": kept}
    if source.loaded is not None:
        facts["loaded"] = source.loaded
    if schedule is not None:
        facts["alignment"] = schedule.alignment
    if isinstance(schedule, PruneSchedule):
        facts["importance"] = schedule.importance
    return facts


def _entry(file: Path, result: Explanation, files: dict[str, str]) -> dict[str, Any]:
    return {
        "file": str(file),
        "readout": result.readout,
        "blocks": list(result.blocks),
        "variants": dict(result.variants),
        "figures": files,
    }


def _table(result: Explanation, source: LoadedSource) -> Table:
    """What each variant says of the image."""
    rows = []
    for name, numbers in result.variants.items():
        shares = numbers["probabilities"]
        # Stable: of equal shares the lower class comes first, in every variant.
        best = np.argsort(-np.asarray(shares), kind="stable")[:_TOP]
        labels = [str(c) if source.labels is None else source.labels[c] for c in best]
        # Names have commas and numbers of their own.
        classes = "; ".join(f"{n}: {shares[c]:.1%}" for n, c in zip(labels, best, strict=True))
        alike = ", ".join(f"{share:.0%}" for share in numbers["kept_as_last"])
        rows.append([name, classes, alike or "-"])
    return Table(("variant", "best classes", "kept as in the last variant, by stage"), rows)
