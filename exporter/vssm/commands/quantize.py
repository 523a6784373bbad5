"""The command `vssm quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vssm.commands.options import Directory, Folder, Force, Json, Threads, words
from vssm.commands.tables import say, working, write_result
from vssm.extras import explain_missing

if TYPE_CHECKING:
    from vssm.artifact.directory import Artifact

_SHOWN = 8  # names of layers that stay float


def quantize(
    directory: Directory,
    output: Folder,
    images: Annotated[
        Path | None, typer.Argument(help="Folder of images to calibrate on; best of training.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="ort (ONNX Runtime), tensorrt, or portable, which any runtime takes.",
            **words("ort", "tensorrt", "portable"),
        ),
    ] = "ort",
    number: Annotated[
        str,
        typer.Option(
            "--type",
            help="int8; int4, with --weights-only; or fp8 (E4M3, TensorRT).",
            **words("int8", "int4", "fp8"),
        ),
    ] = "int8",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave activations float; needs no images.")
    ] = False,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Ranges measured in every run; needs no images.")
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(
            help="Range of an activation: minmax, percentile (99.99 %) or entropy.",
            **words("minmax", "percentile", "entropy"),
        ),
    ] = "minmax",
    count: Annotated[int, typer.Option(help="Images to calibrate with.")] = 128,
    seed: Annotated[int, typer.Option(help="Which of the folder's images these are.")] = 0,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of node names that stay float, such as '*/x_proj/*', repeatable; auto "
            "finds sensitive layers."
        ),
    ] = None,
    ends: Annotated[
        bool, typer.Option("--ends", help="Quantise the first and the last layers too.")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Quantise the matrix products of a float32 export to INT8, INT4 or FP8."""
    from vssm.quantization.request import QuantizeRequest, check_request

    if weights_only and dynamic:
        raise ValueError("--weights-only and --dynamic contradict each other; give one")
    request = QuantizeRequest(
        method="weights" if weights_only else "dynamic" if dynamic else "static",
        type=number,
        target=target,
        calibration=calibration,
        count=count,
        seed=seed,
        keep_float=tuple(keep_float or ()),
        ends=ends,
        threads=threads,
    )
    check_request(request, images=images is not None)  # before onnx is imported
    before = _bytes(directory)  # which `output` may be
    with working("opening the model") as progress:
        with explain_missing("quantize"):
            from vssm.quantization.quantize import quantize as quantize_export

        artifact = quantize_export(
            directory, images, output, request, force=force, progress=progress
        )
    _print(before, artifact)
    write_result(json_file, artifact.manifest)


def _bytes(directory: Path) -> int:
    """Those of the model, with the weights that lie beside it."""
    from vssm.artifact.directory import EXTERNAL_FILE, MODEL_FILE

    files = (directory / MODEL_FILE, directory / EXTERNAL_FILE)
    return sum(path.stat().st_size for path in files if path.is_file())


def _print(before: int, artifact: Artifact) -> None:
    info, after = artifact.manifest.quantization, _bytes(artifact.directory)
    if info is None:
        raise AssertionError("what was quantised says so")
    total = info.nodes + len(info.kept_float)
    say(f"quantised {info.nodes} of {total} matrix products ({info})")
    if info.kept_float:
        more = len(info.kept_float) - _SHOWN
        names = ", ".join(info.kept_float[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        say(f"float: {names}")
    share = f"{after / before:.2f} of the float file"
    say(f"wrote {artifact.model_path} ({after:,} bytes, {share})")
