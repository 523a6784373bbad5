"""What an ONNX file says of itself, read without the package onnx; model.json is held against it.

Only the structure is read: names, types, shapes, operators, versions, and where weights lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from vssm.artifact.manifest import Manifest, TensorInfo
from vssm.errors import ArtifactError
from vssm.files.messages import message_types
from vssm.files.text import shown
from vssm.ops.spec import DOMAIN

# Numbers of the fields as onnx.proto gives them (https://github.com/onnx/onnx). Names are bytes:
# a damaged one must not stop the reader. `raw_data` and its like are left out, so never copied.
_TYPES: Final = message_types(
    "onnx",
    {
        "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
        "Dim": {"dim_value": (1, "int64"), "dim_param": (2, "bytes")},
        "Shape": {"dim": (1, "Dim*")},
        "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
        "Type": {"tensor_type": (1, "TensorType")},
        "Value": {"name": (1, "bytes"), "type": (2, "Type")},
        "Tensor": {
            "data_type": (2, "int32"),
            "external_data": (13, "Entry*"),
        },
        "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
        "Attribute": {
            "t": (5, "Tensor"),
            "g": (6, "Graph"),
            "tensors": (10, "Tensor*"),
            "graphs": (11, "Graph*"),
            "sparse_tensor": (22, "Sparse"),
            "sparse_tensors": (23, "Sparse*"),
        },
        "Node": {
            "op_type": (4, "bytes"),
            "attribute": (5, "Attribute*"),
            "domain": (7, "bytes"),
        },
        "Graph": {
            "node": (1, "Node*"),
            "initializer": (5, "Tensor*"),
            "input": (11, "Value*"),
            "output": (12, "Value*"),
            "sparse_initializer": (15, "Sparse*"),
        },
        "Opset": {"domain": (1, "bytes"), "version": (2, "int64")},
        "Function": {
            "name": (1, "bytes"),
            "node": (7, "Node*"),
            "domain": (10, "bytes"),
            "attribute_proto": (11, "Attribute*"),
        },
        "Model": {
            "graph": (7, "Graph"),
            "opset_import": (8, "Opset*"),
            "functions": (25, "Function*"),
        },
    },
)
_DTYPES: Final = {
    1: "float32",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}
_QUANTIZED: Final = frozenset({b"DequantizeLinear", b"MatMulInteger", b"MatMulNBits"})
_HALVES: Final = ("float16", "bfloat16")
# Two spellings of one domain.
_STANDARD: Final = ("", "ai.onnx")
_DOMAIN: Final = DOMAIN.encode()


@dataclass(frozen=True)
class ModelFacts:
    """What one ONNX file says.

    Attributes:
        inputs: of the graph, without those that are weights.
        outputs: of the graph.
        opsets: operator domain -> version; the standard one is "".
        operators: names of this package's operators, in the graph and every graph inside it.
        bodies: those that the file has a function for.
        halves: which of float16 and bfloat16 the weights have.
        external: names of the files beside it that hold weights, as the file spells them.
        quantized: whether a node of the graph reads quantised weights.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opsets: dict[str, int]
    operators: frozenset[str]
    bodies: frozenset[str]
    halves: frozenset[str]
    external: frozenset[str]
    quantized: bool


def read_facts(data: bytes) -> ModelFacts:
    """Read the structure of a serialized ModelProto.

    Raises:
        ArtifactError: the bytes are no ONNX model.
    """
    model = _TYPES["Model"]()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ArtifactError(
            f"these {len(data)} bytes are no ONNX model ({error}); export the model again"
        ) from error
    graphs = list(_graphs_in(model.graph.node, model.graph))
    ours = (n.op_type for graph in graphs for n in graph.node if n.domain == _DOMAIN)
    bodies = (f.name for f in model.functions if f.domain == _DOMAIN)
    kinds = {_DTYPES.get(t.data_type, "") for t in model.graph.initializer}
    return ModelFacts(
        inputs=tuple(map(_tensor_info, model.graph.input)),
        outputs=tuple(map(_tensor_info, model.graph.output)),
        opsets=_opsets(model.opset_import),
        operators=frozenset(map(_text, ours)),
        bodies=frozenset(map(_text, bodies)),
        halves=frozenset(kinds.intersection(_HALVES)),
        external=frozenset(_external(model, graphs)),
        quantized=any(n.op_type in _QUANTIZED for n in model.graph.node),
    )


def differences(manifest: Manifest, facts: ModelFacts, *, inlined: bool = False) -> list[str]:
    """What model.json claims and the ONNX file does not hold, as sentences.

    Args:
        manifest: the claims.
        facts: of model.onnx, or of model.inlined.onnx.
        inlined: of the latter, which has no operators of ours.
    """
    operators = {} if inlined else manifest.operators
    version = facts.opsets.get(DOMAIN)
    # A model of half precision has float32 tensors too, so only the halves tell what it is.
    halves = {manifest.dtype} if manifest.dtype in _HALVES else set()
    claims: list[tuple[str, object, object]] = [
        ("inputs", _plain(manifest.inputs), _plain(facts.inputs)),
        ("outputs", _plain(manifest.outputs), _plain(facts.outputs)),
        ("opset", manifest.opset, facts.opsets.get("")),
        ("operators", sorted(operators), sorted(facts.operators)),
        ("weights of half precision", sorted(halves), sorted(facts.halves)),
        *((f"operators.{name}", claimed, version) for name, claimed in operators.items()),
    ]
    # A module of the user's may hold such nodes by itself; a claim must be true.
    if manifest.quantization is not None:
        claims.append(("quantization", True, facts.quantized))
    found = [
        f"model.json claims {name}={shown(claimed, limit=300)}, but it has "
        f"{shown(actual, limit=300)}"
        for name, claimed, actual in claims
        if claimed != actual
    ]
    return found + [
        f"it keeps weights in {shown(repr(name), limit=80)}, which model.json does not list"
        for name in sorted(facts.external)
        if name not in manifest.files
    ]


def _plain(tensors: Iterable[TensorInfo]) -> list[tuple[object, ...]]:
    return [(t.name, t.dtype, t.shape) for t in tensors]


def _text(name: bytes) -> str:
    # Two names that are damaged in different ways must not become one.
    return name.decode("utf-8", "surrogateescape")


def _opsets(imports: Iterable[Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for opset in imports:
        domain = _text(opset.domain)
        domain = "" if domain in _STANDARD else domain
        if found.setdefault(domain, opset.version) != opset.version:
            raise ArtifactError(
                f"the model imports {shown(domain) or 'the standard operators'} in the versions "
                f"{found[domain]} and {opset.version}; export the model again"
            )
    return found


def _tensor_info(value: Any) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype = _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
    shape = tuple(_text(d.dim_param) or int(d.dim_value) for d in tensor.shape.dim)
    return TensorInfo(_text(value.name), dtype, shape)


def _graphs_in(nodes: Iterable[Any], *outer: Any) -> Iterator[Any]:
    """The graphs `outer`, and those inside the nodes, at any depth."""
    yield from outer
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                yield from inner
                waiting.extend(graph.node for graph in inner)


def _external(model: Any, graphs: Iterable[Any]) -> Iterator[str]:
    """Files that hold weights, of every tensor wherever it stands."""
    # A tensor in a function or an attribute can name a file as well as an initializer, and a file
    # that was missed here would be read unchecked.
    inside = [g for f in model.functions for g in _graphs_in(f.node)]
    attributes = [a for f in model.functions for a in f.attribute_proto]
    nodes = [n for f in model.functions for n in f.node]
    for graph in (*graphs, *inside):
        nodes.extend(graph.node)
        for sparse in graph.sparse_initializer:
            yield from (*_locations(sparse.values), *_locations(sparse.indices))
        for tensor in graph.initializer:
            yield from _locations(tensor)
    attributes += [a for n in nodes for a in n.attribute]
    for attribute in attributes:
        if attribute.HasField("t"):
            yield from _locations(attribute.t)
        sparse = [*attribute.sparse_tensors]
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        for tensor in (*attribute.tensors, *(p for s in sparse for p in (s.values, s.indices))):
            yield from _locations(tensor)


def _locations(tensor: Any) -> Iterator[str]:
    """All are told where the key comes twice: readers differ in which one they take."""
    return (_text(entry.value) for entry in tensor.external_data if entry.key == b"location")
