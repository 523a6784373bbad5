"""The command `vssm`: arguments to functions, results to tables and JSON. No arithmetic here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exporter import pipeline
from exporter._version import __version__
from exporter.artifact import Artifact
from exporter.errors import VssmError
from exporter.files import atomic_write_bytes

app = typer.Typer(
    name="vssm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune vision state-space models, export them to ONNX, run, prove and measure them.",
)
console = Console()
_errors = Console(stderr=True)

Directory = Annotated[Path, typer.Argument(help="What `vssm export` wrote.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Runtime = Annotated[str, typer.Option(help="ort-cpu or torch.")]
Operators = Annotated[
    str | None, typer.Option(help="kernel (the default) or body, for ONNX Runtime.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of one run; all cores by default.")]


def main() -> None:
    """Run the command; exit code 0 success, 1 a check failed, 2 bad usage or input."""
    try:
        app()
    except (VssmError, ValueError, TypeError) as error:
        _errors.print(f"[bold red]error[/]: {_plain(error)}", soft_wrap=True)
        sys.exit(2)


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


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
    from exporter.tables import table

    rows = pipeline.describe_models()
    _write_json(json_file, rows)
    columns = ("model", "parameters", "image", "tokens", "GFLOPs published rule", "true")
    console.print(
        table(
            "models (tokens of the first block; multiply-adds; the published rule counts one of "
            "Vim's two directions)",
            columns,
            (
                (
                    r["name"],
                    f"{r['parameters']:,}",
                    "x".join(map(str, r["image_size"])),
                    r["tokens"],
                    f"{r['flops_published'] / 1e9:.2f}",
                    f"{r['flops_true'] / 1e9:.2f}",
                )
                for r in rows
            ),
        )
    )


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="One of `vssm models`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; seeded ones without.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the checkpoint's EMA weights.")] = False,
    schedule: Annotated[str | None, typer.Option(help="BLOCK:RATIO,..., 5:0.8,10:0.8.")] = None,
    alignment: Annotated[str, typer.Option(help="gap, constant or none.")] = "gap",
    importance: Annotated[
        str, typer.Option(help="clip, sum, l1, l2, as_released or random.")
    ] = "clip",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    opset: Annotated[int, typer.Option(help="18 to 20.")] = 18,
    num_classes: Annotated[int, typer.Option(help="Width of the classifier.")] = 1000,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Model option KEY=VALUE, repeatable.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names, one a line or JSON.")] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="Also write model.inlined.onnx.")
    ] = False,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave weights.safetensors out.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export there.")] = False,
    json_file: Json = None,
) -> None:
    """Export a model, pruned or dense, to model.onnx and model.json."""
    request = pipeline.ExportRequest(
        name=name,
        checkpoint=checkpoint,
        source="ema" if ema else "model",
        schedule=schedule,
        alignment=alignment,
        importance=importance,
        dtype=dtype,
        opset=opset,
        num_classes=num_classes,
        options=_options(option or []),
        labels=labels,
        inline=inline,
        weights=not no_weights,
        force=force,
    )
    with console.status("working") as status:
        artifact = pipeline.export_model(request, output, progress=status.update)
    _write_json(json_file, dataclasses.asdict(artifact.manifest))
    _print_export(artifact)


def _print_export(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.checkpoint is None:
        console.print("[yellow]no checkpoint given: these are the seeded initial weights[/]")
    else:
        console.print(f"weights: {manifest.checkpoint.file}")
    if manifest.schedule is not None:
        console.print(f"tokens kept by stage: {list(manifest.schedule.num_keep)}")
    size = artifact.model_path.stat().st_size
    console.print(f"wrote {artifact.model_path} ({size:,} bytes, {manifest.dtype})")


@app.command()
def check(
    directory: Directory,
    runtime: Runtime = "ort-cpu",
    operators: Operators = None,
    threads: Threads = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file to check with, repeatable.")
    ] = None,
    per_block: Annotated[
        bool, typer.Option("--per-block", help="Compare every block's output.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Compare a runtime with the float64 oracle; exit code 1 if they differ."""
    from exporter.tables import parity_tables

    with console.status("comparing with the float64 oracle"):
        report = pipeline.check_directory(
            directory,
            runtime,
            image_files=image or [],
            operators=operators,
            threads=threads,
            per_block=per_block,
        )
    _write_json(json_file, dataclasses.asdict(report))
    for shown in parity_tables(report):
        console.print(shown)
    for failure in report.failures:
        console.print(f"[bold red]failed[/]: {failure}", soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)
    console.print("[bold green]passed[/]")


@app.command()
def run(
    directory: Directory,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    runtime: Runtime = "ort-cpu",
    operators: Operators = None,
    threads: Threads = None,
    labels: Annotated[Path | None, typer.Option(help="Class names, one a line or JSON.")] = None,
    top: Annotated[int, typer.Option(help="Classes to print.")] = 5,
    json_file: Json = None,
) -> None:
    """Classify image files."""
    from exporter.tables import table

    results, info = pipeline.classify(
        directory,
        images,
        runtime,
        operators=operators,
        threads=threads,
        labels=labels,
        top=top,
    )
    _write_json(json_file, {"runtime": dataclasses.asdict(info), "images": results})
    rows = (
        (r["file"] if i == 0 else "", p["label"], f"{p['probability']:.4f}")
        for r in results
        for i, p in enumerate(r["predictions"])
    )
    console.print(table(str(info), ("image", "class", "probability"), rows))


@app.command()
def bench(
    directory: Directory,
    batch: Annotated[str, typer.Option(help="Batch sizes, 1,8.")] = "1,8",
    threads: Annotated[str, typer.Option(help="Thread counts, 1,2.")] = "1",
    samples: Annotated[int, typer.Option(help="Timed runs of each.")] = 21,
    torch_loop: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Time the PyTorch loop too.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="HTML page; DIR/bench.html.")] = None,
    json_file: Json = None,
) -> None:
    """Measure kernel, fallback body and PyTorch loop, dense and pruned, in one run."""
    from exporter.tables import bench_tables

    with console.status("measuring") as status:
        measured = pipeline.bench_directory(
            directory,
            batches=_integers("batch", batch),
            threads=_integers("threads", threads),
            samples=samples,
            torch_loop=torch_loop,
            page=report,
            progress=status.update,
        )
    _write_json(json_file, dataclasses.asdict(measured))
    for shown in bench_tables(measured):
        console.print(shown)
    console.print(f"wrote {report or directory / 'bench.html'}")


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what is on this machine, and what each absent part needs."""
    from exporter.doctor import examine
    from exporter.tables import findings_table

    findings = examine()
    _write_json(json_file, [dataclasses.asdict(f) for f in findings])
    console.print(findings_table(findings))


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        text = json.dumps(value, indent=2, default=str)
        atomic_write_bytes(path, f"{text}\n".encode())


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a list of integers; write 1,8") from None


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: is not KEY=VALUE; write for example image_size=384")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


if __name__ == "__main__":
    main()
