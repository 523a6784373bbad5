"""Runs one operator with the native library, into outputs full of NaN between guards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library
from vssm.onnx.bodies import build_functions
from vssm.ops.spec import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES, axes_of
from vssm.runtimes.library import ISA_NAMES, exp2_rate

if TYPE_CHECKING:
    import onnxruntime

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.float64: TensorProto.DOUBLE,
}
_GUARD = 64  # elements before and after an output
_NOTHING = torch.empty(1)


# A search of build/ takes a millisecond, as a call of a kernel does.
found_library = functools.cache(find_library)


def available_isas() -> list[str]:
    """The instruction sets that this processor and this build have."""
    found = []
    for isa in ISA_NAMES:
        try:
            exp2_rate(isa, seconds=0.0)
        except RuntimeUnavailableError:
            continue
        found.append(isa)
    return found


def isa_parameters() -> list[object]:
    """Every instruction set for `parametrize`; the absent are skipped, with the reason."""
    try:
        find_library()
    except RuntimeUnavailableError as error:
        pytest.fail(str(error))
    found = available_isas()
    absent = pytest.mark.skip(reason="this processor or this build lacks the instruction set")
    return [isa if isa in found else pytest.param(isa, marks=absent) for isa in ISA_NAMES]


def make_session(
    name: str,
    types: Mapping[str, int],
    attributes: tuple[tuple[str, int | float | str], ...] = (),
    *,
    shapes: Mapping[str, list[int | str]] | None = None,
    threads: int = 1,
    body: bool = False,
) -> onnxruntime.InferenceSession:
    """A session for a model of one node. `types`: ONNX type of each input and output by name.

    With `body` the fallback body runs, without our library.
    """
    spec = OPERATORS[name]

    def value(operand_name: str) -> object:
        shape = None if shapes is None else shapes.get(operand_name)
        return helper.make_tensor_value_info(operand_name, types[operand_name], shape)

    node = helper.make_node(
        name,
        [o.name for o in spec.inputs],
        [o.name for o in spec.outputs],
        domain=DOMAIN,
        **dict(attributes),
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [value(o.name) for o in spec.inputs],
        [value(o.name) for o in spec.outputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    functions = build_functions([name], 18) if body else []
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    import onnxruntime  # not above: tests of the CUDA kernels share this file and need none

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not body:
        options.register_custom_ops_library(str(found_library()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def output_types(name: str, inputs: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The types of an operator's outputs: those of the inputs with the same type variable."""
    spec = OPERATORS[name]
    variables = {o.dtype: inputs[o.name].dtype for o in spec.inputs if o.dtype.startswith("T")}
    return {o.name: variables.get(o.dtype, torch.int32) for o in spec.outputs}


def output_shapes(
    name: str, inputs: Mapping[str, Tensor], attributes: Mapping[str, int | float]
) -> dict[str, tuple[int, ...]]:
    """The shapes of an operator's outputs, from the symbols of the operator table."""
    spec = OPERATORS[name]
    sizes = {
        symbol: size
        for o in spec.inputs
        for symbol, size in zip(
            axes_of(o, int(attributes.get("direction_axis", 2))), inputs[o.name].shape, strict=False
        )
    }
    sizes["num_keep"] = int(attributes.get("num_keep", 0))
    return {o.name: tuple(sizes[symbol] for symbol in o.shape) for o in spec.outputs}


@functools.lru_cache(maxsize=64)
def _session(
    name: str,
    types: tuple[tuple[str, int], ...],
    attributes: tuple[tuple[str, int | float | str], ...],
    threads: int,
    body: bool,
) -> onnxruntime.InferenceSession:
    spec = OPERATORS[name]
    operands = (*spec.inputs, *spec.outputs)
    # A body does not load where a rank is not known.
    ranks: dict[str, list[int | str]] = {
        o.name: [f"{o.name}_{s}" for s in o.shape] for o in operands
    }
    shapes = ranks if body else None
    return make_session(name, dict(types), attributes, shapes=shapes, threads=threads, body=body)


def run_operator(
    name: str,
    inputs: Mapping[str, Tensor],
    *,
    threads: int = 1,
    body: bool = False,
    **attributes: int | float,
) -> dict[str, Tensor]:
    """Outputs of one operator, read from memory that was NaN before, between untouched guards."""
    given = output_types(name, inputs)
    types = {n: ONNX_TYPES[t.dtype] for n, t in inputs.items()}
    types |= {n: ONNX_TYPES[t] for n, t in given.items()}
    everything = tuple(sorted({**attributes, **PLUGIN_ATTRIBUTES}.items()))
    session = _session(name, tuple(sorted(types.items())), everything, threads, body)
    binding = session.io_binding()
    kept = {n: t.contiguous() for n, t in inputs.items()}
    for n, tensor in kept.items():
        pointer = tensor.data_ptr() or _NOTHING.data_ptr()  # an empty tensor has no address
        binding.bind_input(n, "cpu", 0, types[n], list(tensor.shape), pointer)
    buffers, views = {}, {}
    for n, shape in output_shapes(name, inputs, attributes).items():
        count = torch.Size(shape).numel()
        buffers[n] = torch.full((count + 2 * _GUARD,), _poison(given[n]), dtype=given[n])
        views[n] = buffers[n][_GUARD : _GUARD + count].view(shape)
        pointer = buffers[n].data_ptr() + _GUARD * buffers[n].element_size()
        binding.bind_output(n, "cpu", 0, types[n], list(shape), pointer)
    session.run_with_iobinding(binding)
    for n, buffer in buffers.items():
        _assert_guards(n, buffer)
    return views


def _poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else -7


def _assert_guards(name: str, buffer: Tensor) -> None:
    for guard in (buffer[:_GUARD], buffer[-_GUARD:]):
        untouched = guard.isnan() if buffer.dtype.is_floating_point else guard == -7
        assert untouched.all(), f"{name}: written outside its memory"
