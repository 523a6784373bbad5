"""The command `vssm ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from exporter.cli_options import options
from exporter.files import check_writable
from exporter.json_files import write_json
from exporter.pipeline_ablate import TABLES, AblationOptions
from exporter.pipeline_ablate import ablate as ablate_model
from exporter.pipeline_subject import SubjectRequest

if TYPE_CHECKING:
    from exporter.training.ablate_report import AblationReport

console = Console(markup=False, emoji=False)


def ablate(
    source: Annotated[str, typer.Argument(help="What `vssm export` wrote, or a model's name.")],
    images: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a named model; seeded ones without.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the checkpoint's EMA weights.")] = False,
    schedule: Annotated[
        str | None, typer.Option(help="BLOCK:RATIO,..., or default; the export's own without.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the random choice.")] = 3,
    ratios: Annotated[str, typer.Option(help="Keep ratios of the sweep.")] = "0.9,0.8,0.7,0.6,0.5",
    finetuned: Annotated[
        list[str] | None,
        typer.Option(help="VARIANT=FILE: a row with these weights too; repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a run.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    classes: Annotated[
        Path | None, typer.Option(help="File naming the folder of each class; by name without.")
    ] = None,
    operators: Annotated[str, typer.Option(help="auto, oracle or kernel.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    num_classes: Annotated[int | None, typer.Option(help="Width of a named model's head.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Option KEY=VALUE of a named model.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Compare alignments, importances, an EViT-style baseline and keep ratios on a data set."""
    sizes = options(option or [])
    request = SubjectRequest(source, checkpoint, ema, schedule, num_classes, sizes)
    asked = AblationOptions(
        seeds=seeds,
        ratios=[ratio.strip() for ratio in ratios.split(",")],
        batch=batch,
        workers=workers,
        classes=classes,
        operators=operators,
        device=device,
        finetuned=_files(finetuned or []),
    )
    _run(request, images, output, asked, json_file)


def _run(
    request: SubjectRequest,
    images: Path,
    output: Path,
    asked: AblationOptions,
    json_file: Path | None,
) -> None:
    if json_file is not None:
        check_writable(json_file)
    with console.status("building the variants") as status:
        report = ablate_model(
            request, images, output, asked, progress=lambda line: status.update(Text(line))
        )
    _print(report, output)
    if json_file is not None:
        write_json(json_file, report)


def _files(pairs: list[str]) -> dict[str, Path]:
    """Read VARIANT=FILE pairs.

    Raises:
        ValueError: a pair is malformed, or its variant is named twice.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        key, equals, file = pair.partition("=")
        if not equals or not file:
            raise ValueError(
                f"--finetuned {pair}: is not VARIANT=FILE; write gap=model.safetensors"
            )
        if key in found:
            raise ValueError(f"--finetuned {pair}: {key} is named twice; give one file")
        found[key] = Path(file)
    return found


def _print(report: AblationReport, output: Path) -> None:
    from exporter.tables import table
    from exporter.training.ablate_report import COLUMNS, cells

    for name, value in report.facts.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    for title in dict.fromkeys(row.table for row in report.rows):
        rows = (cells(row) for row in report.rows if row.table == title)
        console.print(table(title, COLUMNS, rows))
    for key, reason in report.left_out.items():
        console.print(Text.assemble(("left out", "yellow"), f": {key}: {reason}"), soft_wrap=True)
    for path, error in report.unreadable:
        console.print(Text.assemble(("not read", "yellow"), f": {path}: {error}"), soft_wrap=True)
    console.print(f"wrote {output / TABLES}", soft_wrap=True)
