"""The commands that leave this machine: `vssm engine` and `vssm bundle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.commands.options import Directory, Json, Labels, Threads, integers
from vssm.commands.tables import say, working, write_result

if TYPE_CHECKING:
    from vssm.runtimes.tensorrt.engine import EngineInfo

EngineBackend = Annotated[
    str | None,
    typer.Option(help="kernel (the default: our plugins) or body, the file's functions."),
]
Hardware = Annotated[
    str | None,
    typer.Option(help="Runs on other GPUs too: ampere-plus or same-compute-capability."),
]


def engine(
    directory: Directory,
    rtx: Annotated[
        bool, typer.Option("--rtx", help="TensorRT for RTX: no GPU needed, fallback bodies.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes MIN,OPT,MAX.")] = "1,8,32",
    backend: EngineBackend = None,
    memory: Annotated[
        int | None, typer.Option(help="Workspace limit in MiB. Default: TensorRT's own.")
    ] = None,
    level: Annotated[
        int | None,
        typer.Option(help="How long to search for kernels, 0 to 5. Default: TensorRT's own."),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of timings; beside the model by default.")
    ] = None,
    serialize_plugins: Annotated[
        bool, typer.Option("--serialize-plugins", help="Put the plugin library into the engine.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later TensorRT too.")
    ] = False,
    hardware_compatible: Hardware = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="With --rtx: GPUs to compile for, such as 8.6,8.9.")
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Build a TensorRT engine beside model.onnx."""
    from vssm.runtimes.tensorrt.build import EngineRequest, build_engine, check_request

    request = EngineRequest(
        runtime="tensorrt-rtx" if rtx else "tensorrt",
        backend=backend,
        batch=_three(batch),
        memory_mib=memory,
        level=level,
        timing_cache=timing_cache,
        plugins_inside=serialize_plugins,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        compute_capabilities=tuple(compute_capability.split(",")) if compute_capability else (),
        threads=threads,
    )
    check_request(request)  # before the export is read and hashed
    artifact = open_artifact(directory, only=(MODEL_FILE,))  # all that an engine is made from
    with working("opening the model") as progress:
        info = build_engine(artifact, request, progress=progress)
    _print_engine(directory, info)
    write_result(json_file, info)


def bundle(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="An export; with --verify, a bundle.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check a bundle's hashes, and run its model.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="What the server calls the model; the export's name by default."),
    ] = None,
    labels: Labels = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes MIN,OPT,MAX; 1,8,32 by default. Of no whole detector."),
    ] = None,
    queue_us: Annotated[
        int | None,
        typer.Option(help="Microseconds that a request waits for others; 500 by default."),
    ] = None,
    instances: Annotated[int, typer.Option(help="Copies of the model on a device.")] = 1,
    web: Annotated[
        bool, typer.Option("--web", help="A page that runs the model in a browser.")
    ] = False,
    ort_web: Annotated[
        str | None,
        typer.Option(help="With --web: address of onnxruntime-web. Default: npm downloads it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle there.")] = False,
    json_file: Json = None,
) -> None:
    """Pack an export so that a Triton server or a browser runs it, or check such a bundle."""
    # Exactly one: a bundle to make has an output, one to check has none.
    if verify == (output is not None):
        raise ValueError("give either -o OUT, to make a bundle, or --verify, to check one")
    if output is None:
        _refuse_given(
            context,
            ("name", "labels", "batch", "queue_us", "instances", "web", "ort_web", "force"),
            "with --verify, which makes no bundle",
        )
        _verify_bundle(directory, json_file)
        return
    if web:
        _refuse_given(
            context, ("name", "batch", "queue_us", "instances"), "with --web, which has no server"
        )
        _bundle_page(directory, output, labels, ort_web, force, json_file)
        return
    _refuse_given(context, ("ort_web",), "without --web, which makes the page that loads it")
    from vssm.bundle.make import BundleRequest, make_bundle
    from vssm.bundle.triton import ServingOptions

    serving = ServingOptions(
        None if batch is None else _three(batch), queue_us=queue_us, instances=instances
    )
    request = BundleRequest(name, labels, serving, force=force)
    manifest = make_bundle(open_artifact(directory, only=(MODEL_FILE,)), output, request)
    for part, reason in manifest.absent.items():
        # Not an error: most of it the Dockerfile and start.sh make on the server.
        say((f"left out: {part}: {reason}", "yellow"))
    say(f"wrote {output} ({len(manifest.files)} files); see {output / 'README.md'}")
    write_result(json_file, manifest)


def _bundle_page(
    directory: Path,
    output: Path,
    labels: Path | None,
    ort_web: str | None,
    force: bool,
    json_file: Path | None,
) -> None:
    from vssm.bundle.web import WebRequest, check_web_request, make_web_bundle

    request = WebRequest(labels, ort_web, force)
    check_web_request(request)  # before the export is read
    with working("packing the page"):  # npm may take a while
        manifest = make_web_bundle(open_artifact(directory, only=()), output, request)
    say(f"wrote {output} ({len(manifest.files)} files); to look at it: python3 {output}/serve.py")
    write_result(json_file, manifest)


def _refuse_given(context: typer.Context, options: Sequence[str], why: str) -> None:
    for option in options:
        # A value does not tell whether it was given or is the default; click's context does.
        source = context.get_parameter_source(option)
        if source is not None and source.name != "DEFAULT":
            value = context.params[option]
            raise ValueError(f"{option}={value} {why}: leave it out")


def _verify_bundle(directory: Path, json_file: Path | None) -> None:
    from vssm.bundle.verify import verify_bundle

    report = verify_bundle(directory)
    for failure in report.failures:
        say((f"failed: {failure}", "bold red"))
    if report.not_run:
        say((f"the model was not run: {report.not_run}", "yellow"))
    else:
        say(
            f"{report.name}: {report.files} files hashed, {report.kernels} kernels ran, "
            f"{report.compared} within {report.difference:.1e} of the fallback bodies'"
        )
    # Before the exit: a script wants to read what failed.
    write_result(json_file, report)
    if not report.passed:
        # A failed check; 2 would be a wrong call.
        raise typer.Exit(1)
    say(("passed", "bold green"))


def _three(batch: str) -> tuple[int, int, int]:
    sizes = integers("batch", batch)
    if len(sizes) != 3:
        raise ValueError(f"batch={batch!r} is not three sizes; give MIN,OPT,MAX, such as 1,8,32")
    low, opt, high = sizes
    return low, opt, high


def _print_engine(directory: Path, info: EngineInfo) -> None:
    from vssm.runtimes.tensorrt.api import PRODUCTS

    product = PRODUCTS[info.product]
    model = (directory / "model.onnx").stat().st_size
    say(
        f"{product.title} {info.version}, {info.gpu or 'no GPU needed'}, batch "
        f"{'-'.join(map(str, info.batch))}, backend: {info.backend}"
    )
    say(
        f"{info.nodes:,} nodes became {info.layers:,} layers; model.onnx of {model:,} bytes became "
        f"an engine of {info.plan_bytes:,} bytes in {info.seconds:.1f} s"
    )
    if not product.plugins:
        say(
            (
                f"{product.title} runs no plugin layers: every scan and gather runs as its "
                "fallback body, a loop of standard layers, which is slower and larger than the "
                "kernel; for the kernels build with `vssm engine` where full TensorRT and a GPU "
                "are",
                "yellow",
            )
        )
    say(f"wrote {directory / product.plan} and {directory / product.info}")
