"""The command `vssm`: arguments to functions, results to tables and JSON. No arithmetic here."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vssm._version import __version__
from vssm.artifact.directory import Artifact, open_artifact
from vssm.artifact.preprocessing import preprocess
from vssm.bench.run import bench_directory
from vssm.commands.ablate import ablate
from vssm.commands.deploy import bundle, engine
from vssm.commands.evaluate import evaluate
from vssm.commands.export import ExportRequest, add_to, export_model
from vssm.commands.finetune import finetune
from vssm.commands.options import (
    Alignment,
    Checkpoint,
    Conv,
    Directory,
    Ema,
    Folder,
    Importance,
    Inline,
    Json,
    Labels,
    NumClasses,
    Operators,
    OtherRuntime,
    Runtime,
    Schedule,
    Switches,
    Threads,
    Trust,
    integers,
    options,
    say,
    telling,
)
from vssm.commands.visualize import visualize
from vssm.errors import ArtifactError, VssmError
from vssm.evaluation.classify import classify
from vssm.extras import explain_missing
from vssm.files.json import write_json

app = typer.Typer(
    name="vssm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune vision state-space models, export them to ONNX, run, prove and measure them.",
)
# File names and labels are shown as they are, whatever brackets or colons they hold.
console = Console(markup=False, emoji=False)
_errors = Console(stderr=True, markup=False, emoji=False)


def main() -> None:
    """Run the command; exit code 0 success, 1 a check failed, 2 bad usage or input, 3 a fault."""
    try:
        with explain_missing():
            app()
    except (VssmError, ValueError, TypeError, OSError, MemoryError) as error:
        say(_errors, "error", "bold red", f": {error or type(error).__name__}")
        sys.exit(2)
    except Exception:  # not 1: a script would take it for a failed check
        traceback.print_exc()
        say(_errors, "fault", "bold red", ": unexpected; unless memory ran out, please report it")
        sys.exit(3)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.print(f"vssm {__version__}")
        raise typer.Exit()


@app.command()
def models(json_file: Json = None) -> None:
    """List the models with their size and cost."""
    from vssm.commands.tables import models_table
    from vssm.models.cost import describe_models

    rows = describe_models()
    console.print(models_table(rows))
    _write_json(json_file, rows)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="One of `vssm models`.")],
    output: Folder,
    checkpoint: Checkpoint = None,
    ema: Ema = False,
    schedule: Schedule = None,
    alignment: Alignment = None,
    importance: Importance = None,
    conv: Conv = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[int, typer.Option(help="18 to 20.")] = 18,
    num_classes: NumClasses = 1000,
    option: Switches = None,
    labels: Labels = None,
    inline: Inline = False,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave weights.safetensors out.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export there.")] = False,
    json_file: Json = None,
) -> None:
    """Export a model, pruned or dense, to model.onnx and model.json."""
    request = ExportRequest(
        name=name,
        checkpoint=checkpoint,
        weights="ema" if ema else "model",
        schedule=schedule,
        alignment=alignment,
        importance=importance,
        conv=conv,
        dtype=dtype,
        opset=opset,
        num_classes=num_classes,
        options=options(option or []),
        labels=labels,
        inline=inline,
        write_weights=not no_weights,
        force=force,
    )
    with telling(console, "working") as tell:
        artifact = export_model(request, output, progress=tell)
    _print_export(artifact)
    _write_json(json_file, artifact.manifest)


def _print_export(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.checkpoint is None:
        console.print("no checkpoint given: these are the seeded initial weights", style="yellow")
    else:
        console.print(f"weights: {manifest.checkpoint.file}")
    if manifest.schedule is not None:
        console.print(f"tokens kept by stage: {list(manifest.schedule.num_keep)}")
    size = artifact.model_path.stat().st_size
    console.print(f"wrote {artifact.model_path} ({size:,} bytes, {manifest.dtype})")


add_to(app)


@app.command()
def check(
    directory: Directory,
    runtime: OtherRuntime = "ort-cpu",
    backend: Operators = None,
    threads: Threads = None,
    trust: Trust = False,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file, repeatable; noise without.")
    ] = None,
    per_block: Annotated[
        bool, typer.Option("--per-block", help="Compare every block's output.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Compare a runtime with the float64 oracle; exit code 1 if they differ."""
    from vssm.commands.tables import parity_tables
    from vssm.parity.check import check_parity

    with console.status("comparing with the float64 oracle"):
        artifact = open_artifact(directory)
        report = check_parity(
            None,
            artifact,
            runtime,
            preprocess(image, artifact) if image else None,
            backend=backend,
            threads=threads,
            trust=trust,
            per_block=per_block,
        )
    for shown in parity_tables(report):
        console.print(shown)
    for failure in report.failures:
        say(console, "failed", "bold red", f": {failure}")
    _write_json(json_file, report)
    try:
        write_json(directory / "parity.json", report)
    except ArtifactError as error:  # a check may look at what it cannot write to
        say(_errors, "parity.json was not written", "yellow", f": {error}")
    if not report.passed:
        raise typer.Exit(1)
    say(console, "passed", "bold green")


@app.command()
def run(
    directory: Directory,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    runtime: Runtime = "ort-cpu",
    backend: Operators = None,
    threads: Threads = None,
    trust: Trust = False,
    labels: Labels = None,
    top: Annotated[int, typer.Option(help="Classes to print.")] = 5,
    json_file: Json = None,
) -> None:
    """Classify image files."""
    from vssm.commands.tables import table

    results, info = classify(
        directory,
        images,
        runtime,
        backend=backend,
        threads=threads,
        trust=trust,
        labels=labels,
        top=top,
    )
    rows = (
        (r["file"] if i == 0 else "", p["label"], f"{p['probability']:.4f}")
        for r in results
        for i, p in enumerate(r["predictions"])
    )
    console.print(table(str(info), ("image", "class", "probability"), rows))
    _write_json(json_file, {"runtime": info, "images": results})


@app.command()
def bench(
    directory: Directory,
    runtime: OtherRuntime = "ort-cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    threads: Annotated[str, typer.Option(help="Thread counts, separated by commas.")] = "1",
    samples: Annotated[int, typer.Option(help="Timed runs of each subject.")] = 21,
    torch_loop: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Time the PyTorch loop too.")
    ] = True,
    trust: Trust = False,
    report: Annotated[
        Path | None, typer.Option(help="HTML page; DIR/bench.html by default.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure kernel, fallback body and PyTorch loop, dense and pruned, in one run."""
    from vssm.commands.tables import bench_tables

    with telling(console, "measuring") as tell:
        measured = bench_directory(
            directory,
            batches=integers("batch", batch),
            threads=integers("threads", threads),
            samples=samples,
            torch_loop=torch_loop,
            runtime=runtime,
            trust=trust,
            page=report,
            progress=tell,
        )
    for shown in bench_tables(measured):
        console.print(shown)
    _write_json(json_file, measured)
    console.print(f"wrote {report or directory / 'bench.html'}")


app.command()(engine)
app.command()(bundle)
app.command()(evaluate)
app.command()(finetune)
app.command()(ablate)
app.command()(visualize)


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what is on this machine, and what each absent part needs."""
    from vssm.commands.tables import findings_table
    from vssm.runtimes.doctor import examine

    findings = examine()
    console.print(findings_table(findings))
    _write_json(json_file, findings)


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        write_json(path, value)


if __name__ == "__main__":
    main()
