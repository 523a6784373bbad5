"""The packages that `pip install vssm` leaves out, and the extra that brings each of them.

Running an export takes numpy, onnxruntime, pillow, protobuf, typer and rich. Everything else is
imported by what needs it, and this is the one place that says how to get it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Final

from vssm.errors import MissingPackageError

# Import name: the extra of pyproject.toml, and what the package is for.
PACKAGES: Final[Mapping[str, tuple[str, str]]] = {
    "torch": ("export", "models in PyTorch, and the float64 oracle"),
    "onnx": ("export", "reading and writing ONNX graphs"),
    "onnx_ir": ("export", "rewriting ONNX graphs"),
    "onnxscript": ("export", "translating PyTorch to ONNX"),
    "safetensors": ("export", "reading and writing weights"),
    "polygraphy": ("export", "comparing a runtime with the oracle"),
    "tensorboard": ("training", "TensorBoard logs of a training"),
    "jinja2": ("reports", "reports as pages"),
    "matplotlib": ("reports", "plots and figures"),
    "einops": ("compat", "model code that imports einops"),
    "huggingface_hub": ("hub", "checkpoints from a Hugging Face hub"),
    "pyarrow": ("predict", "predictions as Parquet"),
    "pycocotools": ("coco", "average precision of detectors"),
    "ray": ("scale", "scoring on a cluster"),
}


def install_command(package: str, extra: str | None = None) -> str:
    """The command that installs one of `PACKAGES` with all that it is used with.

    Args:
        package: its import name.
        extra: one that brings less, where that is enough.
    """
    return f'pip install "vssm[{extra or PACKAGES[package][0]}]"'


def is_installed(package: str) -> bool:
    """Whether one of `PACKAGES` is there; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """Refuse early what would miss one of `PACKAGES` late.

    Raises:
        MissingPackageError: it is not installed.
    """
    if not is_installed(package):
        raise _missing(package)


@contextlib.contextmanager
def explain_missing(extra: str | None = None) -> Iterator[None]:
    """Let an import that misses one of `PACKAGES` say how to install it; other errors pass.

    Args:
        extra: one that brings all of the import's packages, if it is not that of `PACKAGES`.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # A part that an installed package lacks is another fault, which no extra mends.
        if package in PACKAGES and not is_installed(package):
            raise _missing(package, extra) from error
        raise


def _missing(package: str, extra: str | None = None) -> MissingPackageError:
    purpose = PACKAGES[package][1]
    return MissingPackageError(
        f"package={package} is not installed; it is for {purpose}: "
        f"{install_command(package, extra)}",
        name=package,
    )
