"""The command `vssm`: arguments to functions, results to tables and JSON. No arithmetic here."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vssm._version import __version__
from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.artifact.manifest import read_manifest
from vssm.commands.ablate import ablate
from vssm.commands.compare import compare
from vssm.commands.deploy import bundle, engine
from vssm.commands.evaluate import evaluate
from vssm.commands.export import export, export_module
from vssm.commands.finetune import finetune
from vssm.commands.options import (
    Backend,
    Directory,
    Json,
    Labels,
    OtherRuntime,
    Runtime,
    Threads,
    Trust,
    integers,
)
from vssm.commands.predict import predict
from vssm.commands.quantize import quantize
from vssm.commands.tables import (
    bench_tables,
    console,
    errors,
    findings_table,
    models_tables,
    parity_tables,
    say,
    show,
    table,
    working,
    write_result,
)
from vssm.commands.visualize import visualize
from vssm.errors import ArtifactError, VssmError, reason
from vssm.extras import explain_missing
from vssm.files.json import write_json

if TYPE_CHECKING:
    from vssm.runtimes.session import Session
    from vssm.types import Steps

# How torch and ONNX Runtime say it, who do not raise MemoryError.
_NO_MEMORY = ("can't allocate memory", "Failed to allocate memory", "bad allocation", "bad_alloc")

app = typer.Typer(
    name="vssm",
    no_args_is_help=True,
    # `main` tells every error itself.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune vision state-space models, export them to ONNX, run, prove and measure them.",
)


def main() -> None:
    """Run the command; exit code 0 success, 1 a check failed, 2 bad usage or input, 3 a fault."""
    # By default it ends a process without any `finally`, and leaves what was being written.
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A letter that the terminal's encoding lacks must not cost the result of the work.
            stream.reconfigure(errors="backslashreplace")
    try:
        with explain_missing():
            _refuse_empty(sys.argv[1:])
            app()
    except (VssmError, ValueError, TypeError, OSError, MemoryError) as error:
        # A MemoryError has no text.
        say(("error", "bold red"), f": {error or type(error).__name__}", to=errors)
        sys.exit(2)
    except Exception as error:  # not 1: a script would take it for a failed check
        if any(words in str(error) for words in _NO_MEMORY):
            rest = f": not enough memory ({reason(error)}); take a smaller model, image or batch"
            say(("error", "bold red"), rest, to=errors)
            sys.exit(2)
        errors.print(traceback.format_exc(), highlight=False, soft_wrap=True)
        rest = ": unexpected; unless memory ran out, please report it"
        say(("fault", "bold red"), rest, to=errors)
        sys.exit(3)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an argument of no letters: as a path it would be where the command runs."""
    for before, argument in zip(["vssm", *arguments], arguments, strict=False):
        bare = argument.startswith("--") and argument.find("=") == len(argument) - 1
        if bare or not argument:
            name = argument if bare else f"the argument behind {before}"
            raise ValueError(
                f"{name} is empty; give a value (perhaps a variable of your shell is not set)"
            )


def _terminate(number: int, _: object) -> None:
    """End as an interrupt does: what was begun is put back, or goes, on the way out."""
    # The exit code that a shell gives to what a signal has ended.
    raise SystemExit(128 + number)


# Without a command too, or `vssm --version` would ask for one.
@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.print(f"vssm {__version__}")
        raise typer.Exit()


@app.command()
def models(json_file: Json = None) -> None:
    """List the models with their size, their cost and their official checkpoints."""
    # Every command imports what it runs by itself, so that no other one waits for it.
    from vssm.models import describe_models

    rows = describe_models()
    show(*models_tables(rows))
    write_result(json_file, rows)


# Help lists commands in the order of these lines, so they are not registered all at once.
app.command()(export)
app.command()(export_module)
app.command()(quantize)


@app.command()
def check(
    directory: Directory,
    runtime: OtherRuntime = "ort-cpu",
    backend: Backend = None,
    threads: Threads = None,
    trust: Trust = False,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image file, or folder of them, repeatable. Default: noise."),
    ] = None,
    per_block: Annotated[
        bool, typer.Option("--per-block", help="Compare every block's output.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Compare a runtime with the float64 oracle; exit code 1 if they differ."""
    from vssm.runtimes.open import check_runtime

    # Before the export is hashed and the slow oracle runs.
    check_runtime(runtime, backend=backend, threads=threads, trust=trust)
    with working("opening the model") as tell:
        artifact = open_artifact(directory)
        from vssm.parity.check import check_parity, held_out_images

        images = held_out_images(image, artifact) if image else None
        report = check_parity(
            None,
            artifact,
            runtime,
            images,
            backend=backend,
            threads=threads,
            trust=trust,
            per_block=per_block,
            progress=tell,
        )
    show(*parity_tables(report))
    for failure in report.failures:
        say(("failed", "bold red"), f": {failure}")
    write_result(json_file, report)
    try:
        write_json(directory / "parity.json", report)
    except ArtifactError as error:  # a check may look at what it cannot write to
        say(("parity.json was not written", "yellow"), f": {error}", to=errors)
    if not report.passed:
        raise typer.Exit(1)
    say(("passed", "bold green"))


@app.command()
def run(
    directory: Directory,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    runtime: Runtime = "ort-cpu",
    backend: Backend = None,
    threads: Threads = None,
    trust: Trust = False,
    labels: Labels = None,
    top: Annotated[int, typer.Option(help="Classes, or detections, to print.")] = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Of a segmenter or a detector: directory for what it draws."
        ),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option(help="Of a detector: least score to print and draw; 0.3 by default."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Classify image files, segment them or find objects; exit code 1 if one cannot be read."""
    from vssm.evaluation.classify import classify
    from vssm.evaluation.label_maps import is_segmenter

    manifest = read_manifest(directory)
    options = {"backend": backend, "threads": threads, "trust": trust}
    if manifest.gives_boxes:
        _detect(directory, images, runtime, options, labels, top, score, output, json_file)
        return
    if score is not None:
        raise ValueError(f"score={score}: only detectors have it; leave it out")
    if is_segmenter(manifest):
        _segment(directory, images, runtime, options, labels, top, output, json_file)
        return
    if output is not None:
        raise ValueError(
            f"output={str(output)!r}: classes are printed, and --json writes them; only "
            "segmenters and detectors write images: leave it out"
        )
    with working("opening the model") as tell:
        results, info = classify(
            directory,
            images,
            runtime,
            backend=backend,
            threads=threads,
            trust=trust,
            labels=labels,
            top=top,
            progress=tell,
        )
    rows = (
        (r["file"] if i == 0 else "", p["label"], f"{p['probability']:.4f}")
        for r in results
        for i, p in enumerate(r["predictions"])
    )
    show(table(str(info), ("image", "class", "probability"), rows))
    write_result(json_file, {"runtime": info, "images": results})
    _tell_unread(results)


def _tell_unread(results: Sequence[Mapping[str, Any]]) -> None:
    # At the end, where they are seen: one bad file keeps nobody from the other results.
    unread = [row for row in results if row["error"] is not None]
    for row in unread:
        say(("not read", "bold red"), f": {row['error']}", to=errors)
    if unread:
        raise typer.Exit(1)


@contextmanager
def _to_draw(
    directory: Path,
    runtime: str,
    options: Mapping[str, Any],
    labels: Path | None,
    output: Path | None,
    why: str,
) -> Iterator[tuple[Session, Sequence[str] | None, Steps, Path]]:
    """A session, the names of its classes, a progress, and the directory for what is drawn."""
    from vssm.artifact.preprocessing import read_labels
    from vssm.runtimes.open import check_runtime, open_session

    if output is None:
        raise ValueError(f"output: {why}; say -o DIR")
    check_runtime(runtime, **options)
    artifact = open_artifact(directory, only=(MODEL_FILE,))
    names = artifact.manifest.labels
    if labels is not None:
        names = read_labels(labels, int(artifact.manifest.config["num_classes"]))
    stays = "the images that are written stay"
    with (
        working("opening the model", leaves=stays) as progress,
        open_session(artifact, runtime, **options) as session,
    ):
        yield session, names, progress, output


def _segment(
    directory: Path,
    images: list[Path],
    runtime: str,
    options: Mapping[str, Any],
    labels: Path | None,
    top: int,
    output: Path | None,
    json_file: Path | None,
) -> None:
    """Label maps and overlays of image files, and the classes by their share of the pixels."""
    from vssm.evaluation.label_maps import write_label_maps

    why = "a segmenter writes a label map and an overlay of each image"
    with _to_draw(directory, runtime, options, labels, output, why) as (session, names, tell, to):
        results = write_label_maps(session, images, to, names=names, top=top, progress=tell)
        info = session.info
    rows = (
        (r["file"] if i == 0 else "", c["label"], f"{c['share']:.2%}")
        for r in results
        for i, c in enumerate(r["classes"])
    )
    show(table(str(info), ("image", "class", "share of pixels"), rows))
    say(f"wrote {2 * sum(r['error'] is None for r in results)} PNG files to {output}")
    write_result(json_file, {"runtime": info, "images": results})
    _tell_unread(results)


def _detect(
    directory: Path,
    images: list[Path],
    runtime: str,
    options: Mapping[str, Any],
    labels: Path | None,
    top: int,
    score: float | None,
    output: Path | None,
    json_file: Path | None,
) -> None:
    """Boxes and masks drawn on image files, and all that was found as COCO's results."""
    from vssm.evaluation.detect import LEAST_SCORE, RESULTS, write_detections

    why = "a detector writes a drawing of each image and what it found"
    least = LEAST_SCORE if score is None else score
    with _to_draw(directory, runtime, options, labels, output, why) as (session, names, tell, to):
        results = write_detections(
            session, images, to, names=names, top=top, least=least, progress=tell
        )
        info = session.info
    rows = (
        (
            r["file"] if i == 0 else "",
            d["label"],
            f"{d['score']:.3f}",
            ", ".join(f"{edge:.1f}" for edge in d["box"]),
        )
        for r in results
        for i, d in enumerate(r["detections"])
    )
    show(table(str(info), ("image", "class", "score", "box: left, top, right, bottom"), rows))
    drawn = sum(r["error"] is None for r in results)
    say(f"wrote {drawn} PNG files and {RESULTS} to {output}")
    write_result(json_file, {"runtime": info, "images": results})
    _tell_unread(results)


@app.command()
def bench(
    directory: Directory,
    runtime: OtherRuntime = "ort-cpu",
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, separated by commas; 1,8 by default, 1 of a detector."),
    ] = None,
    threads: Annotated[str, typer.Option(help="Thread counts, separated by commas.")] = "1",
    samples: Annotated[int, typer.Option(help="Timed runs of each subject.")] = 21,
    torch_loop: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Time the PyTorch loop too.")
    ] = True,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another export to measure, in place of the dense one made for this."),
    ] = None,
    trust: Trust = False,
    report: Annotated[
        Path | None, typer.Option(help="HTML page; DIR/bench.html by default.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure kernel, fallback body and PyTorch loop, dense and pruned, in one run."""
    from vssm.runtimes.open import check_runtime

    check_runtime(runtime, trust=trust)
    batches = None if batch is None else integers("batch", batch)
    counts = integers("threads", threads)
    with working("opening the model") as tell:
        from vssm.bench.run import bench_directory

        measured = bench_directory(
            directory,
            batches=batches,
            threads=counts,
            samples=samples,
            torch_loop=torch_loop,
            runtime=runtime,
            beside=beside or (),
            trust=trust,
            page=report,
            progress=tell,
        )
    show(*bench_tables(measured))
    for note in measured.notes:
        say(("note", "yellow"), f": {note}")
    write_result(json_file, measured)
    say(f"wrote {report or directory / 'bench.html'}")


app.command()(engine)
app.command()(bundle)
app.command()(evaluate)
app.command()(predict)
app.command()(finetune)
app.command()(ablate)
app.command()(compare)
app.command()(visualize)


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what is on this machine, and what each absent part needs."""
    from vssm.runtimes.doctor import examine

    findings = examine()
    show(findings_table(findings))
    write_result(json_file, findings)


if __name__ == "__main__":
    main()
