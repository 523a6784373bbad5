"""Quantised exports of modules of the user's: what stays float is float, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command import Run
from compat_cases import SlowPath, built
from quantized import COUNT, graph_of, in_every_way, pictures, sqnr
from torch import Tensor, nn

import vssm
from vssm.artifact.directory import EXTERNAL_FILE, MODEL_FILE, Artifact, open_artifact
from vssm.artifact.manifest import Preprocessing, TensorInfo, write_manifest
from vssm.artifact.preprocessing import preprocessing_of
from vssm.artifact.reference import stored_reference
from vssm.bundle.web import WebRequest, make_web_bundle
from vssm.files.atomic import sha256_of
from vssm.parity.compare import _top1_agreement
from vssm.quantization.calibrate import ranges
from vssm.quantization.products import Product, chosen

FIRST = "/mix/MatMul"  # reads the weight that /mix/MatMul_1 reads too
STATIC = vssm.QuantizeRequest(count=COUNT, keep_float=(FIRST,))
FLOAT_FIRST = vssm.QuantizeRequest(keep_float=(FIRST,))
WAYS = {
    "ort": STATIC,
    "tensorrt": dataclasses.replace(STATIC, target="tensorrt"),
    "fp8": dataclasses.replace(STATIC, target="tensorrt", type="fp8"),
    "weights": dataclasses.replace(FLOAT_FIRST, method="weights"),
    "int4": dataclasses.replace(FLOAT_FIRST, method="weights", type="int4"),
    "dynamic": dataclasses.replace(FLOAT_FIRST, method="dynamic"),
}
# Signal over noise of the logits; E4M3 keeps three bits of every number behind its first.
LEAST = {name: 20 if name == "fp8" else 25 for name in WAYS}
_INTEGERS = {"DequantizeLinear", "DynamicQuantizeLinear"}


class Twice(nn.Module):
    """Linear layers in two places, of stacks of tokens and of a matrix, and a Mamba mixer.

    Beside them layers of odd names, of zeros, behind a rectifier, with half of a bias, and one
    whose operand is an output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.mix, self.pool, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)
        self.odd = nn.ModuleDict({"a[0]": nn.Linear(12, 12), "p*": nn.Linear(12, 12)})
        self.weight, self.bias = (nn.Parameter(torch.randn(n, 12) / 3) for n in (12, 1))
        self.zero = nn.Linear(12, 12)
        nn.init.zeros_(self.zero.weight)
        self.mixer = SlowPath()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.mix(self.stem(images).flatten(2).transpose(1, 2))
        tokens = self.mix(tokens + self.mixer(tokens))
        features = tokens + self.zero(self.odd["a[0]"](tokens).relu())
        x = self.odd["p*"](features).mean(1)
        x = torch.addmm(self.bias, self.pool(self.pool(x)), self.weight, beta=0.5)
        return {"logits": self.head(x), "features": features}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("float") / "out"
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spec = Preprocessing.for_image_size(32)
    options = {"preprocessing": spec, "opset": 19, "external_data_above": 0}
    return vssm.export_module(built(Twice), example, out, **options)


@pytest.fixture(scope="module")
def fixed(source: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same for two images at a time."""
    copy = shutil.copytree(source.directory, tmp_path_factory.mktemp("fixed") / "out")
    proto = onnx.load(str(copy / MODEL_FILE))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(proto, copy / MODEL_FILE)

    def two(specs: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
        return tuple(dataclasses.replace(spec, shape=(2, *spec.shape[1:])) for spec in specs)

    manifest = source.manifest
    changes = {"inputs": two(manifest.inputs), "outputs": two(manifest.outputs)}
    files = {**manifest.files, MODEL_FILE: sha256_of(copy / MODEL_FILE)}
    write_manifest(copy, dataclasses.replace(manifest, files=files, **changes))
    return open_artifact(copy)


@pytest.fixture(scope="module")
def made(
    source: Artifact, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    return in_every_way(source, folder, tmp_path_factory.mktemp("quantised"), WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_float_reads_float_weights(
    way: str, source: Artifact, made: dict[str, Artifact]
) -> None:
    info = made[way].manifest.quantization
    assert info is not None
    assert FIRST in info.kept_float
    assert {"/stem/Conv", "/head/Gemm"} < set(info.kept_float), "the first and the last layer"
    before = {node.name: node for node in graph_of(source).node}
    after = graph_of(made[way])
    makers = {output: node.op_type for node in after.node for output in node.output}
    found = {node.name: node for node in after.node}
    for name in info.kept_float:
        assert found[name] == before[name]
        assert not _INTEGERS & {makers.get(value) for value in found[name].input}
    assert makers["features"] == "Add", "the output, not what the product behind it reads"
    integers = sum(
        node.op_type in {"MatMulNBits", "MatMulInteger"}
        or (node.op_type in {"MatMul", "Gemm"} and _reads_integers(node, makers))
        for node in after.node
    )
    assert integers == info.nodes


def _reads_integers(node: onnx.NodeProto, makers: dict[str, str]) -> bool:
    return bool(_INTEGERS & {makers.get(value) for value in node.input})


@pytest.mark.parametrize("way", WAYS)
def test_it_is_near_the_module(way: str, source: Artifact, made: dict[str, Artifact]) -> None:
    report = vssm.check_parity(None, made[way])
    assert report.passed, report.failures
    assert set(source.manifest.files) - set(made[way].manifest.files) == {EXTERNAL_FILE}, "small"
    proto = onnx.load(str(made[way].model_path))
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    feeds, exact = stored_reference(source)
    for backend in ("kernel", "body"):
        with vssm.open_session(made[way], backend=backend, threads=1) as session:
            assert sqnr(session.run(feeds)["logits"], exact["logits"]) > LEAST[way]


def test_commands_take_it(
    made: dict[str, Artifact], folder: Path, tmp_path: Path, cli: Run
) -> None:
    out, classes = made["ort"].directory, tmp_path / "classes.txt"
    classes.write_text("\n".join(f"class{i}" for i in range(7)))
    assert cli("check", out) == 0
    assert cli("run", out, folder / "class0/0.png") == 0
    results = ("--results", tmp_path / "results.csv")
    assert cli("evaluate", out, folder, "--classes", classes, *results) == 0
    assert cli("bundle", out, "-o", tmp_path / "bundle") == 0
    assert cli("bundle", tmp_path / "bundle", "--verify") == 0
    assert cli("quantize", out, "-o", tmp_path / "again", "--weights-only") == 2
    assert "is quantised already" in cli.out


@pytest.mark.parametrize("keep", [(), ("auto",)])
def test_a_fixed_batch_is_calibrated_in_its_batches(
    keep: tuple[str, ...], fixed: Artifact, source: Artifact, folder: Path, tmp_path: Path
) -> None:
    request = dataclasses.replace(STATIC, keep_float=keep)
    of_two = vssm.quantize(fixed, folder, tmp_path / "two", request)
    of_any = vssm.quantize(source, folder, tmp_path / "any", request)
    weights = [{t.name: t.raw_data for t in graph_of(a).initializer} for a in (of_two, of_any)]
    assert weights[0] == weights[1], "the ranges of the same images"
    info = of_any.manifest.quantization
    assert info is not None
    assert "/zero/MatMul" not in info.kept_float, "what is exact is not sensitive"
    request = dataclasses.replace(request, count=5)
    with pytest.raises(ValueError, match=r"count=5 is not a multiple of 2, .* give --count 6"):
        vssm.quantize(fixed, folder, tmp_path / "odd", request)
    assert not (tmp_path / "odd").exists()


def test_other_batches_are_refused_by_what_to_do(fixed: Artifact, tmp_path: Path) -> None:
    message = r"takes 2 at a time; give as many, or export it with a batch of any size"
    with vssm.open_session(fixed, threads=1) as session, pytest.raises(ValueError, match=message):
        session.run(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(ValueError, match="batch=2: the page runs one image at a time"):
        make_web_bundle(fixed, tmp_path / "page", WebRequest(ort_web="https://example.org/ort"))


def test_an_export_without_preprocessing_needs_none(
    source: Artifact, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source.directory, tmp_path / "out")
    bare = dataclasses.replace(source.manifest, preprocessing=None)
    write_manifest(copy, bare)
    with pytest.raises(ValueError, match=r"input \(images\).*use --weights-only or --dynamic"):
        vssm.quantize(copy, folder, tmp_path / "static", STATIC)
    assert vssm.quantize(copy, None, tmp_path / "weights", WAYS["weights"]).manifest.quantization
    several = dataclasses.replace(bare, inputs=(bare.inputs[0], TensorInfo("mask", "bool", (1,))))
    with pytest.raises(ValueError, match="has the inputs images, mask, and an image file is one"):
        preprocessing_of(several)


def _product(name: str, **changes: object) -> Product:
    known = Product(name, "MatMul", "x", f"{name}.weight", 1, 2, right=True, end=False)
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def test_nothing_to_quantise_is_said_with_its_reason() -> None:
    ends = [_product("/stem", operator="Conv", right=False, end=True), _product("/head", end=True)]
    left = [_product("/low", right=False), *ends]
    static, dynamic = vssm.QuantizeRequest(), vssm.QuantizeRequest(method="dynamic")
    cases = (
        ([], static, "the export has none of these; run it as it is"),
        (ends, static, "first and last layers alone (/stem, /head), which stay float; pass ends"),
        (left[:1], dynamic, "takes MatMul by weights on the right alone, and none of 1 products"),
        (left, dynamic, "first and last layers alone (/head)"),
        (left, dataclasses.replace(static, keep_float=("*",)), "keep_float=['*'] leaves none of 3"),
    )
    for products, request, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            chosen(products, request)
    assert chosen(ends, dataclasses.replace(static, ends=True)) == ends
    named = [_product("/odd/a[0]"), _product("/odd/a0"), _product("/p")]
    exactly = dataclasses.replace(static, keep_float=("/odd/a[0]",))
    assert chosen(named, exactly) == named[2:], "by its own name, and as a pattern"


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_numbers_without_a_range_are_named(method: str, tmp_path: Path) -> None:
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", 2))
        for name in ("x", "y")
    )
    weight = onnx.numpy_helper.from_array(np.full((2, 2), 1e30, np.float32), "weight")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "weight"], ["large"], "/first"),
        onnx.helper.make_node("MatMul", ["large", "weight"], ["y"], "/second"),
    ]
    hidden = onnx.helper.make_tensor_value_info("large", onnx.TensorProto.FLOAT, ("batch", 2))
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [weight], value_info=[hidden])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m")
    feeds = [{"x": np.full((1, 2), 1e30, np.float32)}]
    with pytest.raises(ValueError, match=r"the value 'large' .* is not finite on one of them"):
        ranges(tmp_path / "m", feeds, method=method, threads=1, tell=lambda *_: None)


def test_classes_of_tokens_are_compared_token_by_token() -> None:
    want = np.zeros((2, 3, 4))
    want[..., 1] = 1.0
    got = want.copy()
    got[0, 0, 2] = 2.0
    assert _top1_agreement(got, want) == pytest.approx(5 / 6)
