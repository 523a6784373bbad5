"""The commands that leave this machine: `vssm engine` and `vssm bundle`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from exporter import pipeline_deploy
from exporter.cli_options import Directory, Json, Operators, integers
from exporter.pipeline import write_json

if TYPE_CHECKING:
    from exporter.runtimes.engine_info import EngineInfo
    from exporter.runtimes.tensorrt_build import Progress as BuilderProgress

console = Console(markup=False, emoji=False)


def engine(
    directory: Directory,
    rtx: Annotated[
        bool, typer.Option("--rtx", help="TensorRT for RTX: no GPU needed, fallback bodies.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes MIN,OPT,MAX.")] = "1,8,32",
    operators: Operators = None,
    memory: Annotated[int | None, typer.Option(help="Workspace limit in MiB.")] = None,
    level: Annotated[int | None, typer.Option(help="Builder optimisation level, 0 to 5.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of timings; beside the model by default.")
    ] = None,
    serialize_plugins: Annotated[
        bool, typer.Option("--serialize-plugins", help="Put the plugin library into the engine.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later TensorRTs too.")
    ] = False,
    hardware_compatible: Annotated[
        str | None, typer.Option(help="ampere-plus or same-compute-capability.")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="With --rtx, the GPUs to compile for, 8.6,8.9.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Build a TensorRT engine beside model.onnx."""
    from exporter.runtimes.engine_request import EngineRequest

    sizes = integers("batch", batch)
    if len(sizes) != 3:
        raise ValueError(f"batch={batch!r} is not three sizes; give MIN,OPT,MAX, such as 1,8,32")
    request = EngineRequest(
        runtime="tensorrt-rtx" if rtx else "tensorrt",
        operators=operators,
        batch=(sizes[0], sizes[1], sizes[2]),
        memory_mib=memory,
        level=level,
        timing_cache=timing_cache,
        plugins_inside=serialize_plugins,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        compute_capabilities=tuple(compute_capability.split(",")) if compute_capability else (),
    )
    with _phases() as progress:
        info = pipeline_deploy.build_directory(directory, request, progress=progress)
    _print_engine(directory, info)
    if json_file is not None:
        write_json(json_file, info)


@contextmanager
def _phases() -> Iterator[BuilderProgress]:
    """A bar for each phase that the builder is in; it calls from threads of its own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    lock = threading.Lock()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks = {}

        def report(phase: str, step: int, steps: int) -> None:
            with lock:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=steps)
                bars.update(tasks[phase], completed=step, total=steps)
                if step >= steps:
                    bars.remove_task(tasks.pop(phase))

        yield report


def _print_engine(directory: Path, info: EngineInfo) -> None:
    from exporter.runtimes.tensorrt_api import PRODUCTS

    product = PRODUCTS[info.product]
    model = (directory / "model.onnx").stat().st_size
    console.print(
        f"{product.title} {info.version}, {info.gpu or 'no GPU needed'}, batch "
        f"{'-'.join(map(str, info.batch))}, operators: {info.operators}"
    )
    console.print(
        f"{info.nodes:,} nodes became {info.layers:,} layers; model.onnx of {model:,} bytes became "
        f"an engine of {info.plan_bytes:,} bytes in {info.seconds:.1f} s"
    )
    if not product.plugins:
        console.print(
            f"{product.title} runs no plugin layers: every scan and gather runs as its fallback "
            "body, a loop of standard layers, which is slower and larger than the kernel; for the "
            "kernels build with `vssm engine` where full TensorRT and a GPU are",
            style="yellow",
        )
    console.print(f"wrote {directory / product.plan} and {directory / product.info}")
