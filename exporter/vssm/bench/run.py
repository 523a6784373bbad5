"""What `vssm bench` does: measures an export and writes what it found beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssm.artifact.directory import Artifact, open_artifact
from vssm.bench.measure import BenchReport
from vssm.extras import require
from vssm.files.atomic import check_writable
from vssm.files.json import write_json
from vssm.files.progress import automatic, shows_progress
from vssm.runtimes.open import ENGINE_RUNTIMES, refuse_threads
from vssm.types import Steps


@shows_progress
def bench_directory(
    directory: Path,
    *,
    batches: Sequence[int] | None = None,
    threads: Sequence[int] = (1,),
    samples: int = 21,
    torch_loop: bool = True,
    runtime: str = "ort-cpu",
    beside: Sequence[Path] = (),
    trust: bool = False,
    page: Path | None = None,
    progress: Steps = automatic,
) -> BenchReport:
    """Measure an export beside others; writes bench.json and a page into its directory.

    Args:
        directory: of the export.
        batches: batch sizes; None for 1 and 8, and 1 alone where an export takes no other.
        threads: thread counts.
        samples: timed runs of each subject.
        torch_loop: time the reference in PyTorch too.
        runtime: "ort-cpu", "ort-cuda", or one that runs an engine.
        beside: directories of other exports, in place of a dense or float32 twin made for this.
        trust: run an engine that is not of this machine, or was changed.
        page: where to write the page; bench.html in the directory by default.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        ValueError: an argument is none that can be measured.
        ArtifactError, RuntimeUnavailableError, UnsupportedError: as for the sessions.
    """
    from vssm.bench.page import write_page
    from vssm.bench.subjects import bench

    # Now, although only the page needs it: after minutes of measuring it would be too late.
    require("jinja2")
    artifact = open_artifact(directory)
    batches = _batches(artifact, batches)
    page = page or artifact.directory / "bench.html"
    # Tried before the measurement for the same reason.
    for path in (page, artifact.directory / "bench.json"):
        check_writable(path)
    if runtime in ENGINE_RUNTIMES:
        if beside:
            raise ValueError(
                f"beside={[str(other) for other in beside]}: with runtime={runtime!r} an engine is "
                "measured beside its export and a dense engine alone; leave it out"
            )
        from vssm.bench.engine import bench_engine

        # 1 is the default of the option, so it cannot be told from having given none.
        refuse_threads(runtime, None if tuple(threads) == (1,) else list(threads))
        report = bench_engine(
            artifact,
            runtime=runtime,
            batches=batches,
            samples=samples,
            trust=trust,
            progress=progress,
        )
    else:
        report = bench(
            artifact,
            batches=batches,
            threads=threads,
            samples=samples,
            torch_loop=torch_loop,
            runtime=runtime,
            beside=[open_artifact(other) for other in beside],
            progress=progress,
        )
    write_json(artifact.directory / "bench.json", report)
    write_page(report, page)
    return report


def _batches(artifact: Artifact, asked: Sequence[int] | None) -> Sequence[int]:
    fixed = artifact.manifest.batch
    if isinstance(fixed, str):
        return (1, 8) if asked is None else asked
    if asked is not None and set(asked) != {fixed}:
        raise ValueError(
            f"batches={list(asked)}: {artifact.directory} takes {fixed} at a time; leave the "
            "batches out"
        )
    return (fixed,)
