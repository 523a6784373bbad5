"""config.pbtxt of a Triton model repository, from model.json; no server and no protobuf needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vssm.artifact.manifest import Manifest, TensorInfo
from vssm.errors import UnsupportedError

SERVED_LIBRARY: Final = "/opt/vssm/lib/libvssm_onnxruntime.so"  # where the Dockerfile puts it
_TYPES: Final = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


@dataclass(frozen=True)
class ServingOptions:
    """How the server batches.

    Attributes:
        batch: (min, opt, max) of the engine; the server never sends more than max.
        queue_us: how long a request may wait for others, in microseconds.
        instances: copies of the model on a device.
    """

    batch: tuple[int, int, int] = (1, 8, 32)
    queue_us: int = 500
    instances: int = 1


def tensorrt_config(name: str, manifest: Manifest, options: ServingOptions) -> str:
    """config.pbtxt of the TensorRT variant: 1/model.plan, on every GPU."""
    return _config(name, manifest, options, backend="tensorrt", kind="KIND_GPU")


def onnxruntime_config(name: str, manifest: Manifest, options: ServingOptions) -> str:
    """config.pbtxt of the ONNX Runtime variant: 1/model.onnx with our operators, on the CPU.

    The library's path is absolute, as the server hands it to the dynamic loader unchanged.
    """
    library = f'model_operations {{\n  op_library_filename: "{SERVED_LIBRARY}"\n}}\n'
    return _config(name, manifest, options, backend="onnxruntime", kind="KIND_CPU") + library


def _config(
    name: str, manifest: Manifest, options: ServingOptions, *, backend: str, kind: str
) -> str:
    _, opt, high = options.batch
    preferred = ", ".join(map(str, sorted({opt, high})))
    return (
        f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: {high}\n'
        f"{_tensors('input', manifest.inputs)}{_tensors('output', manifest.outputs)}"
        f"instance_group [\n  {{\n    count: {options.instances}\n    kind: {kind}\n  }}\n]\n"
        f"dynamic_batching {{\n  preferred_batch_size: [{preferred}]\n"
        f"  max_queue_delay_microseconds: {options.queue_us}\n}}\n"
    )


def _tensors(field: str, tensors: Sequence[TensorInfo]) -> str:
    blocks = []
    for tensor in tensors:
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(
                f"{field} {tensor.name} is of type {tensor.dtype}, which no served tensor has; "
                "export the model with this vssm"
            )
        sizes = ", ".join(map(str, tensor.shape[1:]))
        lines = [
            f'name: "{tensor.name}"',
            f"data_type: {_TYPES[tensor.dtype]}",
            f"dims: [{sizes}]",
        ]
        if tensor.name == "logits":
            lines.append('label_filename: "labels.txt"')
        blocks.append("  {\n    " + "\n    ".join(lines) + "\n  }")
    return f"{field} [\n" + ",\n".join(blocks) + "\n]\n"
