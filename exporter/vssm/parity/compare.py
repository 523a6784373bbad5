"""Agreement of a session with the float64 oracle, checked twice.

Forced: a temporary copy of the graph keeps the oracle's positions, so that the numbers compare.
Free: the file as it is, so that its own choices compare; every other choice is listed with the
oracle's score margin, because a choice between equal scores is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.artifact.manifest import LOGITS, MERGED_PAIRS, ROUNDING_KEY
from vssm.artifact.reference import OracleMerge, OracleResult
from vssm.models.registry import magnifies
from vssm.parity.detections import (
    DETECTION_TOLERANCES,
    DetectionComparison,
    compare_detections,
)
from vssm.runtimes.graph_edit import FORCED_PAIRS, expose, force_pairs, force_positions
from vssm.runtimes.session import RuntimeInfo
from vssm.types import Array


@dataclass(frozen=True)
class Tolerance:
    """What an export in one dtype may differ from the oracle by.

    Attributes:
        logits: largest error of a logit over the largest logit, positions forced.
        block: largest error of a block's stream over its largest value, positions forced.
        margin: relative score margin under which another choice of tokens is no error.
    """

    logits: float
    block: float
    margin: float

    def of_model(self, name: str) -> Tolerance:
        """The tolerance of a model, wider for a family that magnifies rounding."""
        factor = magnifies(name)
        return Tolerance(factor * self.logits, factor * self.block, self.margin)

    def of_module(self, rounding: float | None) -> Tolerance:
        """The tolerance of a user's module, of which float32 itself is so far off in PyTorch.

        Two float32 computations of a module that magnifies rounding are as far from each other as
        from the exact one.
        """
        least = 2 * (rounding or 0.0)
        return Tolerance(max(self.logits, least), max(self.block, least), self.margin)


# Set from the errors measured on vim_tiny and vim_small, dense and pruned (docs/numerics.md).
TOLERANCES: Final[Mapping[str, Tolerance]] = {
    "float32": Tolerance(logits=2e-5, block=2e-5, margin=1e-5),
    "float16": Tolerance(logits=1e-2, block=1e-2, margin=1e-2),
    "bfloat16": Tolerance(logits=6e-2, block=6e-2, margin=6e-2),
}


@dataclass(frozen=True)
class QuantizedLimits:
    """What a quantised export must reach beside the oracle, positions forced but for `kept`.

    Attributes:
        logits: signal over quantisation noise of the logits, in dB.
        block: the same of every block's stream.
        top1: share of the images that get the oracle's class.
        kept: share of the oracle's kept positions that are kept too, in every stage.
    """

    logits: float
    block: float
    top1: float
    kept: float


# By method, and by type where that decides. Set from what was measured on trained and on seeded
# models (docs/quantization.md).
QUANTIZED: Final[Mapping[str, QuantizedLimits]] = {
    "static": QuantizedLimits(logits=15.0, block=6.0, top1=0.9, kept=0.9),
    "dynamic": QuantizedLimits(logits=15.0, block=6.0, top1=0.9, kept=0.9),
    "weights": QuantizedLimits(logits=30.0, block=25.0, top1=0.9, kept=0.95),
    "int4": QuantizedLimits(logits=15.0, block=12.0, top1=0.9, kept=0.9),
}
# Of a quantised export the largest error says little: one logit of a thousand may be far off.
_LEAST: Final = 1e-30
_NOT_JUDGED: Final = Tolerance(logits=float("inf"), block=float("inf"), margin=1e300)


@dataclass(frozen=True)
class Signal:
    """Signal over noise of one value of a quantised export, and what it must reach, in dB."""

    name: str
    decibels: float
    needed: float
    passed: bool


@dataclass(frozen=True)
class Comparison:
    """One compared output: largest absolute error, the same over the oracle's largest value."""

    name: str
    error: float
    relative: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Disagreement:
    """A position that the oracle keeps and the session does not, or merges otherwise.

    `margin` is the oracle's score of `position` less that of the worst token kept instead, over
    the image's largest score; of a merge, as much of the similarity. It is infinite where no score
    can excuse it (the class token left, no such token), and None where an earlier stage already
    chose differently.
    """

    image: int
    stage: int
    position: int
    margin: float | None


@dataclass(frozen=True)
class LabelComparison:
    """The classes of pixels: the share that agrees, and how many others no rounding excuses.

    `margin` is the largest margin, of the oracle's best class over its second, of a pixel that got
    another class; 0 where there is none.
    """

    agreement: float
    wrong: int
    margin: float


@dataclass(frozen=True)
class ParityReport:
    """Everything `check_parity` found. `failures` are sentences; empty when it passed.

    `free_logits` is of the images whose tokens were chosen alike; None where there are none.
    `top1_agreement` is None for a module that has no logits; its first output is compared then.
    `labels` is None where the file gives no class of every pixel; `detections` are a whole
    detector's, with the oracle's positions and free-running. `signals` are a quantised
    export's, whose errors are not judged: the logits, then every block's streams; `limits` says
    what it must reach.
    """

    info: RuntimeInfo
    dtype: str
    weights: str
    images: int
    forced: Comparison
    free_logits: Comparison | None
    kept_agreement: list[float]
    disagreements: list[Disagreement]
    top1_agreement: float | None
    blocks: list[Comparison] = field(default_factory=list)
    labels: LabelComparison | None = None
    detections: list[DetectionComparison] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    limits: QuantizedLimits | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the session agrees with the oracle within the tolerances."""
        return not self.failures

    @property
    def images_alike(self) -> int:
        """How many images' tokens were all chosen alike."""
        return self.images - len({d.image for d in self.disagreements})

    @property
    def first_bad_block(self) -> str | None:
        """Name of the first block stream out of tolerance; None if there is none."""
        return next((b.name for b in self.blocks if not b.passed), None)


RunFeeds = Callable[[bytes, Mapping[str, Array]], dict[str, Array]]


def compare(
    artifact: Artifact,
    feeds: Mapping[str, Array],
    oracle: OracleResult,
    *,
    info: RuntimeInfo,
    free: Mapping[str, Array],
    run_edited: RunFeeds,
    per_block: bool = False,
) -> ParityReport:
    """Compare one runtime with the oracle.

    Args:
        artifact: the export.
        feeds: the inputs by name that both saw.
        oracle: the float64 model's results.
        info: what ran.
        free: outputs of the unchanged file.
        run_edited: runs a serialized edited graph with given inputs, as `info` says.
        per_block: also compare every block's streams.
    """
    quantized = artifact.manifest.quantization
    tolerance = TOLERANCES[artifact.manifest.dtype].of_model(artifact.manifest.name)
    tolerance = tolerance.of_module(artifact.manifest.config.get(ROUNDING_KEY))
    limits = None
    if quantized is not None:
        limits = QUANTIZED["int4" if quantized.type == "int4" else quantized.method]
        tolerance = _NOT_JUDGED
    streams = _block_names(artifact) if per_block or limits is not None else []
    outputs = {output.name for output in artifact.manifest.outputs}
    main = oracle.main or artifact.manifest.main_output.name
    # Of a whole detector the dense part is inside the graph.
    blocks = set(_block_names(artifact))
    others = [name for name in oracle.blocks if name not in blocks]
    hidden = [name for name in (*others, main) if name not in outputs]
    forced = _run_forced(artifact, feeds, oracle, run_edited, [*streams, *hidden])
    streams += others
    logits = compare_array(main, forced[main], oracle.logits, tolerance.logits)
    kept = [free[f"kept_positions_{i}"] for i in range(len(oracle.kept_positions))]
    pairs = [free[f"{MERGED_PAIRS}{i}"] for i in range(len(oracle.merges))]
    disagreements = _disagreements(kept, oracle, _protected(artifact), pairs=pairs)
    # An image whose tokens were chosen otherwise is another computation: its logits may differ.
    count = len(oracle.logits)
    alike = sorted(set(range(count)) - {d.image for d in disagreements})
    report = ParityReport(
        info=info,
        dtype=artifact.manifest.precision,
        weights=artifact.manifest.weights,
        images=count,
        forced=logits,
        free_logits=compare_array(main, free[main][alike], oracle.logits[alike], tolerance.logits)
        if alike and main in free
        else None,
        kept_agreement=list(map(_agreement, kept, oracle.kept_positions)),
        disagreements=disagreements,
        top1_agreement=_top1_agreement(free[main], oracle.logits) if main == LOGITS else None,
        blocks=[
            compare_array(name, forced[name], oracle.blocks[name], tolerance.block)
            for name in streams
        ],
        labels=_compare_labels(free, oracle, alike, tolerance),
        detections=_compare_detections(artifact, oracle, forced, free, alike),
        limits=limits,
    )
    if limits is not None:
        report.signals.append(signal(main, forced[main], oracle.logits, limits.logits))
        for name in streams:
            report.signals.append(signal(name, forced[name], oracle.blocks[name], limits.block))
        report.failures.extend(_quantized_failures(report, limits))
    report.failures.extend(_failures(report, tolerance))
    return report


def signal(name: str, got: Array, want: Array, needed: float) -> Signal:
    """Signal over noise of `got`, held against `needed` dB; NaN in one of them does not pass."""
    noise = np.linalg.norm(got.astype(np.float64) - want)
    # Without any noise, or any signal, a float32 would still round.
    ratio = max(float(np.linalg.norm(want)), _LEAST) / max(float(noise), _LEAST)
    decibels = 20 * float(np.log10(ratio))
    return Signal(name, decibels, needed, bool(np.isfinite(noise)) and decibels >= needed)


def _quantized_failures(report: ParityReport, limits: QuantizedLimits) -> list[str]:
    failures = [
        f"{s.name}: {s.decibels:.1f} dB of signal over noise, needed {s.needed:g} dB"
        for s in report.signals
        if not s.passed
    ][:2]  # the logits, or the first block: noise goes on from there
    if report.top1_agreement is not None and not report.top1_agreement >= limits.top1:
        failures.append(f"top-1 agreement {report.top1_agreement:.2%}, needed {limits.top1:.0%}")
    for stage, share in enumerate(report.kept_agreement):
        if not share >= limits.kept:
            failures.append(
                f"kept positions agreed in stage {stage}: {share:.2%}, needed {limits.kept:.0%}"
            )
    return failures


def _compare_labels(
    free: Mapping[str, Array], oracle: OracleResult, images: Sequence[int], tolerance: Tolerance
) -> LabelComparison | None:
    """The labels of images whose tokens were chosen alike."""
    if oracle.labels is None or oracle.label_margins is None or not images:
        return None
    other = free["labels"][images] != oracle.labels[images]
    margins = oracle.label_margins[images][other]
    # Either of two logits may be off by the tolerance.
    wrong = int((margins > 2 * tolerance.logits).sum())
    return LabelComparison(1 - float(other.mean()), wrong, float(margins.max(initial=0.0)))


def _compare_detections(
    artifact: Artifact,
    oracle: OracleResult,
    forced: Mapping[str, Array],
    free: Mapping[str, Array],
    alike: Sequence[int],
) -> list[DetectionComparison]:
    """Of a whole detector the detections with the oracle's positions, and free-running."""
    if oracle.detections is None:
        return []
    tolerance = DETECTION_TOLERANCES[artifact.manifest.dtype]
    every = range(len(oracle.detections))
    runs = (("oracle's positions", forced, every), ("free-running", free, alike))
    return [
        compare_detections(
            name, got, oracle.detections, artifact.manifest.config, tolerance, images=images
        )
        for name, got, images in runs
        if images
    ]


def _top1_agreement(got: Array, want: Array) -> float:
    axis = 1 if want.ndim == 4 else -1  # of maps the channels, else the last
    return float((got.argmax(axis) == want.argmax(axis)).mean())


def compare_array(name: str, got: Array, want: Array, tolerance: float) -> Comparison:
    """Largest error of `got` over the largest value of `want`, held against `tolerance`."""
    scale = float(np.abs(want).max())
    # Polygraphy logs every comparison; a level above the highest silences all of it.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        # Relative to the largest value: an element's own size says
        # nothing where it happens to be near 0.
        compare_outputs = SimpleCompareFunc(
            rtol=0.0, atol=tolerance * scale, check_error_stat="max"
        )
        found = compare_outputs(
            # A copy where need be: streams may come as views that are not contiguous.
            IterationResult(outputs={name: np.ascontiguousarray(want, np.float64)}),
            IterationResult(outputs={name: np.ascontiguousarray(got, np.float64)}),
        )[name]
    # Shapes that differ come back as plain False; NaN compares as a failure of infinite size.
    error = float(found.max_absdiff) if hasattr(found, "max_absdiff") else float("inf")
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        error, scale = float("inf"), 1.0
    relative = error / scale if scale else error
    return Comparison(name, error, relative, tolerance, relative <= tolerance)


def _block_names(artifact: Artifact) -> list[str]:
    return [
        name
        for block in artifact.manifest.block_outputs
        for name in (block.hidden, block.residual)
        if name is not None
    ]


def _run_forced(
    artifact: Artifact,
    given: Mapping[str, Array],
    oracle: OracleResult,
    run_edited: RunFeeds,
    streams: Sequence[str],
) -> dict[str, Array]:
    model = onnx.load_from_string(artifact.read(MODEL_FILE))
    names = force_positions(model)
    force_pairs(model)
    expose(model, streams)
    feeds = dict(given)
    gathers = [i for i in model.graph.input if i.name in names]
    stages = enumerate(zip(oracle.kept_positions, oracle.positions, strict=True))
    # A stage that keeps everything has no gather in the graph, and so no input to feed; one that
    # merges is forced by its pairs.
    dropping = [
        kept
        for stage, (kept, before) in stages
        if stage not in oracle.merges and kept.shape[1] < before.shape[1]
    ]
    for i, merge in enumerate(oracle.merges.values()):
        feeds[FORCED_PAIRS.format(i)] = merge.pairs
    for value, kept in zip(gathers, dropping, strict=True):
        width = value.type.tensor_type.shape.dim[1].dim_value
        feeds[value.name] = _for_gather(artifact, kept, width)
    return run_edited(model.SerializeToString(), feeds)


def _for_gather(artifact: Artifact, kept: Array, width: int) -> Array:
    """Kept positions as the gather node has them: as_released puts the class token in later."""
    if kept.shape[1] != width:
        kept = kept[kept != _protected(artifact)].reshape(len(kept), width)
    return kept.astype(np.int32)


def _protected(artifact: Artifact) -> int | None:
    """The class token's position."""
    schedule = artifact.manifest.schedule
    return None if schedule is None else schedule.cls_position


def _agreement(got: Array, want: Array) -> float:
    """Share of the oracle's kept positions that the session keeps too."""
    shared = [len(np.intersect1d(a, b)) for a, b in zip(got, want, strict=True)]
    return float(np.sum(shared) / want.size)


def _disagreements(
    kept: Sequence[Array],
    oracle: OracleResult,
    protected: int | None,
    *,
    pairs: Sequence[Array] = (),
) -> list[Disagreement]:
    found: list[Disagreement] = []
    got_pairs = dict(zip(oracle.merges, pairs, strict=True))
    for image in range(len(oracle.logits)):
        follows = False
        for stage, got in enumerate(kept):
            if stage in oracle.merges:
                present = oracle.positions[stage][image]
                others = _merged_otherwise(oracle.merges[stage], got_pairs[stage][image], image)
                found += [
                    Disagreement(image, stage, int(present[i]), None if follows else margin)
                    for i, margin in others.items()
                ]
                follows = follows or len(others) > 0
                continue
            want = oracle.kept_positions[stage][image]
            missing = np.setdiff1d(want, got[image]).tolist()
            instead = np.setdiff1d(got[image], want).tolist()
            positions, score = oracle.positions[stage][image], oracle.scores[stage][image]
            scores = dict(zip(positions.tolist(), score.tolist(), strict=True))
            for position in missing:
                margin = None if follows else _margin(scores, position, instead)
                # Even where it follows: no choice before may cost the class token.
                margin = float("inf") if position == protected else margin
                found.append(Disagreement(image, stage, position, margin))
            # After the first other choice the scores belong to other tokens and excuse nothing.
            follows = follows or len(missing) > 0
    return found


def _merged_otherwise(oracle: OracleMerge, got: Array, image: int) -> dict[int, float]:
    """Tokens of one image that joined another than the oracle's, or none, and by what margin."""
    rows, columns = (
        x[image if len(x) > 1 else 0].tolist() for x in (oracle.sources, oracle.destinations)
    )
    similarity = oracle.similarity[image]
    largest = float(np.abs(similarity).max()) or 1.0
    theirs = {int(source): int(joined) for source, joined in got}
    ours = {int(source): int(joined) for source, joined in oracle.pairs[image]}

    def of_pair(source: int, joined: int) -> float:
        # A pair of tokens that cannot join is no near choice but a wrong one.
        if source not in rows or joined not in columns:
            return -float("inf")
        return float(similarity[rows.index(source), columns.index(joined)])

    instead = [of_pair(*pair) for pair in theirs.items() if pair[0] not in ours]
    found = {}
    for source, joined in ours.items():
        if theirs.get(source) == joined:
            continue
        other = of_pair(source, theirs[source]) if source in theirs else min(instead)
        found[source] = (of_pair(source, joined) - other) / largest
    return found


def _margin(scores: Mapping[int, float], position: int, instead: Sequence[int]) -> float:
    """How far the scores prefer `position` to the worst of `instead`, over the largest of them."""
    # A position that was not present is no near choice but a wrong one.
    if not instead or not all(other in scores for other in instead):
        return float("inf")
    largest = max(map(abs, scores.values()))
    # Over the largest, as "sum" scores have both signs and the one at the cut may be near 0.
    return (scores[position] - min(scores[other] for other in instead)) / (largest or 1.0)


def _failures(report: ParityReport, tolerance: Tolerance) -> list[str]:
    failures = [] if report.forced.passed else [_out_of_tolerance(report.forced)]
    if report.free_logits is not None and not report.free_logits.passed:
        failures.append("free-running " + _out_of_tolerance(report.free_logits))
    if report.first_bad_block is not None:
        bad = next(b for b in report.blocks if not b.passed)
        failures.append("first block out of tolerance: " + _out_of_tolerance(bad))
    if report.labels is not None and report.labels.wrong:
        failures.append(
            f"labels: {report.labels.wrong} pixels have another class where the oracle's two best "
            f"are up to {report.labels.margin:.1e} of the largest logit apart, and rounding "
            f"explains {2 * tolerance.logits:.0e}"
        )
    failures += [f"detections, {d.name}: {d}" for d in report.detections if not d.passed]
    margins = [(d.margin, d) for d in report.disagreements if d.margin is not None]
    wide = [pair for pair in margins if not pair[0] <= tolerance.margin]  # NaN counts
    if wide:
        margin, worst = max(wide, key=lambda pair: pair[0])
        failures.append(
            f"{len(wide)} tokens chosen otherwise at a relative score margin above "
            f"{tolerance.margin:g}, the widest {margin:.1e} (image {worst.image}, stage "
            f"{worst.stage}, position {worst.position})"
        )
    return failures


def _out_of_tolerance(comparison: Comparison) -> str:
    return (
        f"{comparison.name}: error {comparison.relative:.1e} of the largest value, allowed "
        f"{comparison.tolerance:.1e}"
    )
