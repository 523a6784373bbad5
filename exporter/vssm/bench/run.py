"""What `vssm bench` does: measures an export and writes what it found beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssm.artifact.directory import open_artifact
from vssm.bench.measure import BenchReport
from vssm.extras import require
from vssm.files.atomic import check_writable
from vssm.files.json import write_json
from vssm.runtimes.open import ENGINE_RUNTIMES, refuse_threads
from vssm.types import Progress


def bench_directory(
    directory: Path,
    *,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    samples: int = 21,
    torch_loop: bool = True,
    runtime: str = "ort-cpu",
    trust: bool = False,
    page: Path | None = None,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure an export and, where it is pruned, its dense twin; writes bench.json and a page."""
    from vssm.bench.page import write_page
    from vssm.bench.subjects import bench

    # Now, although only the page needs it: after minutes of measuring it would be too late.
    require("jinja2")
    artifact = open_artifact(directory)
    page = page or artifact.directory / "bench.html"
    # Tried before the measurement for the same reason.
    for path in (page, artifact.directory / "bench.json"):
        check_writable(path)
    if runtime in ENGINE_RUNTIMES:
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
            progress=progress,
        )
    write_json(artifact.directory / "bench.json", report)
    write_page(report, page)
    return report
