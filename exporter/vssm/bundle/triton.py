"""config.pbtxt of a Triton model repository, from model.json; no server needed.

The file is built as a message and written by protobuf's own printer, which quotes every text: no
name can end its quotes and become a setting. It is read back before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import text_format

from vssm.artifact.manifest import LOGITS, SIZES, Manifest, TensorInfo
from vssm.errors import UnsupportedError
from vssm.files.messages import message_types

SERVED_LIBRARY: Final = "/opt/vssm/lib/libvssm_onnxruntime.so"  # where the Dockerfile puts it
_TYPES: Final = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
# The fields that we write, numbered as in Triton's model_config.proto
# (https://github.com/triton-inference-server/common, protobuf/model_config.proto).
_SCHEMA: Final = message_types(
    "triton",
    {
        "Input": {
            "name": (1, "string"),
            "data_type": (2, "DataType"),
            "dims": (4, "int64*"),
            "optional": (8, "bool"),
        },
        "Output": {
            "name": (1, "string"),
            "data_type": (2, "DataType"),
            "dims": (3, "int64*"),
            "label_filename": (4, "string"),
        },
        "Group": {"count": (2, "int32"), "kind": (4, "Kind")},
        "Batching": {
            "preferred_batch_size": (1, "int32*"),
            "max_queue_delay_microseconds": (2, "uint64"),
        },
        "Operations": {"op_library_filename": (1, "string*")},
        "ModelConfig": {
            "name": (1, "string"),
            "max_batch_size": (4, "int32"),
            "input": (5, "Input*"),
            "output": (6, "Output*"),
            "instance_group": (7, "Group*"),
            "dynamic_batching": (11, "Batching"),
            "backend": (17, "string"),
            "model_operations": (18, "Operations"),
        },
    },
    DataType={"TYPE_INVALID": 0, "TYPE_INT32": 8, "TYPE_INT64": 9, "TYPE_FP32": 11},
    Kind={"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
)
_CONFIG: Final = _SCHEMA["ModelConfig"]
_ANY: Final = -1  # a size of which each answer has its own
_BATCH: Final = (1, 8, 32)
_QUEUE_US: Final = 500


@dataclass(frozen=True)
class ServingOptions:
    """How the server batches.

    Attributes:
        batch: (min, opt, max) of the engine; the server never sends more than max. None for 1, 8
            and 32, or for the one image that a whole detector takes.
        queue_us: how long a request may wait for others, in microseconds; None for 500, or for no
            waiting where there are no batches.
        instances: copies of the model on a device.
    """

    batch: tuple[int, int, int] | None = None
    queue_us: int | None = None
    instances: int = 1

    def batching(self, manifest: Manifest) -> tuple[tuple[int, int, int], int]:
        """`batch` and `queue_us` of a model.

        Raises:
            ValueError: one is given to a whole detector.
        """
        if not manifest.gives_boxes:
            queue_us = _QUEUE_US if self.queue_us is None else self.queue_us
            return self.batch or _BATCH, queue_us
        for name, value in (("batch", self.batch), ("queue_us", self.queue_us)):
            if value is not None:
                raise ValueError(
                    f"{name}={value}: a whole detector takes one image at a time, so no requests "
                    "wait for one another; leave it out"
                )
        return (1, 1, 1), 0


def unserved(manifest: Manifest) -> dict[str, str]:
    """The variants that cannot serve a model, "tensorrt" or "onnxruntime", and why not."""
    found = {}
    quantization = manifest.quantization
    if manifest.gives_boxes:
        found["tensorrt"] = (
            "a whole detector finds another number of objects in each image, which TensorRT's "
            "outputs cannot have; serve it with ONNX Runtime, or export it with --outputs dense"
        )
    elif quantization is not None and not quantization.in_tensorrt:
        found["tensorrt"] = (
            f"TensorRT does not take {quantization}; quantise with --target tensorrt or portable"
        )
    if manifest.dtype == "bfloat16":
        found["onnxruntime"] = (
            "ONNX Runtime's CPU provider has no bfloat16 matrix product; export float32 or float16"
        )
    elif quantization is not None and not quantization.in_ort:
        found["onnxruntime"] = (
            f"ONNX Runtime does not run {quantization} by itself; quantise with --target ort or "
            "portable"
        )
    return found


def tensorrt_config(name: str, manifest: Manifest, options: ServingOptions) -> str:
    """config.pbtxt of the TensorRT variant: 1/model.plan, on every GPU."""
    return _printed(_config(name, manifest, options, backend="tensorrt", kind="KIND_GPU"))


def onnxruntime_config(name: str, manifest: Manifest, options: ServingOptions) -> str:
    """config.pbtxt of the ONNX Runtime variant: 1/model.onnx with our operators, on the CPU.

    The library's path is absolute, as the server hands it to the dynamic loader unchanged.
    """
    config = _config(name, manifest, options, backend="onnxruntime", kind="KIND_CPU")
    config["model_operations"] = {"op_library_filename": [SERVED_LIBRARY]}
    return _printed(config)


def read_served_name(text: str) -> str:
    """The model's name in a config.pbtxt of ours.

    Raises:
        ValueError: it is not the text of such a file.
    """
    try:
        return str(text_format.Parse(text, _CONFIG()).name)
    except text_format.ParseError as error:
        raise ValueError(f"config.pbtxt cannot be read ({error})") from error


def _config(
    name: str, manifest: Manifest, options: ServingOptions, *, backend: str, kind: str
) -> dict[str, Any]:
    # Triton adds the batch axis by itself where max_batch_size is above 0.
    first = 0 if manifest.gives_boxes else 1
    config = {
        "name": name,
        "backend": backend,
        "max_batch_size": 0,
        "input": list(_tensors("input", manifest.inputs, first)),
        "output": list(_tensors("output", manifest.outputs, first)),
        "instance_group": [{"count": options.instances, "kind": kind}],
    }
    if first:
        (_, opt, high), queue_us = options.batching(manifest)
        config["max_batch_size"] = high
        config["dynamic_batching"] = {
            # What the engine is tuned for and the most it takes; a set, as they may be one.
            "preferred_batch_size": sorted({opt, high}),
            "max_queue_delay_microseconds": queue_us,
        }
    return config


def _tensors(field: str, tensors: Sequence[TensorInfo], first: int) -> Iterator[dict[str, Any]]:
    """Inputs or outputs, as the configuration has them, with their axes from `first` on."""
    for tensor in tensors:
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(
                f"{field} {tensor.name} is of type {tensor.dtype}, which no served tensor has; "
                "export the model with this vssm"
            )
        dims = [_ANY if isinstance(size, str) else size for size in tensor.shape[first:]]
        kind = _TYPES[tensor.dtype]
        found: dict[str, Any] = {"name": tensor.name, "data_type": kind, "dims": dims}
        # Triton names the best of all numbers of such an output, so they must be one a class.
        if tensor.name == LOGITS and len(dims) == 1:
            found["label_filename"] = "labels.txt"
        # The file has a default, which ONNX Runtime's backend calls an optional input.
        if tensor.name == SIZES:
            found["optional"] = True
        yield found


def _printed(fields: dict[str, Any]) -> str:
    # An error of ours, not of the input's: hence no ValueError.
    message = _CONFIG(**fields)
    text = str(text_format.MessageToString(message))
    if text_format.Parse(text, _CONFIG()) != message:
        raise AssertionError("config.pbtxt does not say what it was made of")
    return text
