"""Quantised exports: which nodes, where the pairs stand, what goes along, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Run
from exports import images, micro, shared_traces
from quantized import COUNT, constants, graph_of, in_every_way, micro_export, pictures, sqnr

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.artifact.manifest import read_manifest, write_manifest
from vssm.artifact.preprocessing import preprocessing_of
from vssm.bench.kinds import count_graph
from vssm.bench.subjects import BODY, FLOAT, KERNEL, slower_than_float
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.verify import verify_bundle
from vssm.errors import ArtifactError, UnsupportedError
from vssm.files.atomic import sha256_of
from vssm.parity.check import held_out_images
from vssm.parity.compare import QUANTIZED, QuantizedLimits, signal
from vssm.quantization import quantize as quantizing
from vssm.quantization.calibrate import choose_images
from vssm.quantization.products import find_products

STATIC = vssm.QuantizeRequest(count=COUNT)
# By what they are made for: the type of activations, and of weights.
TARGETS = {
    "ort": STATIC,
    "portable": dataclasses.replace(STATIC, target="portable"),
    "tensorrt": dataclasses.replace(STATIC, target="tensorrt"),
    "percentile": dataclasses.replace(STATIC, calibration="percentile"),
    "entropy": dataclasses.replace(STATIC, calibration="entropy"),
    "weights": vssm.QuantizeRequest(method="weights"),
    "int4": vssm.QuantizeRequest(method="weights", type="int4"),
    "dynamic": vssm.QuantizeRequest(method="dynamic"),
}
ENDS = ["/head/Gemm", "/patch_embed/proj/Conv"]
INNER = 15  # in_proj twice, x_proj, dt_proj and out_proj of three blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return micro_export(tmp_path_factory.mktemp("float"), inline=True)


@pytest.fixture(scope="module")
def made(
    source: Artifact, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """The export quantised in every way."""
    return in_every_way(source, folder, tmp_path_factory.mktemp("quantised"), TARGETS)


def _logits(artifact: Artifact, backend: str = "kernel") -> np.ndarray:
    with vssm.open_session(artifact, backend=backend, threads=1) as session:
        return session.run(images(micro(), 4, seed=5))["logits"]


@pytest.mark.parametrize("name", TARGETS)
def test_it_runs_with_kernels_and_bodies_and_is_near_the_float_export(
    name: str, source: Artifact, made: dict[str, Artifact]
) -> None:
    got = _logits(made[name])
    np.testing.assert_allclose(got, _logits(made[name], "body"), atol=2e-2, rtol=0)
    # The weights are meaningless and the images are noise, so this is a bound and no claim.
    assert sqnr(got, _logits(source)) > (25 if name == "weights" else 10)


@pytest.mark.parametrize("name", [n for n, r in TARGETS.items() if r.method == "static"])
def test_products_alone_read_quantised_values(name: str, made: dict[str, Artifact]) -> None:
    graph = graph_of(made[name])
    makers = {output: node for node in graph.node for output in node.output}
    products = [n for n in graph.node if n.op_type in {"MatMul", "Gemm"} and n.name not in ENDS]
    assert len(products) == INNER
    for node in products:
        assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    inner = {node.name for node in products}
    for node in graph.node:
        for value in node.input:
            if value in makers and makers[value].op_type == "DequantizeLinear":
                assert node.name in inner
            if value in makers and makers[value].op_type == "QuantizeLinear":
                assert node.op_type == "DequantizeLinear"
    info = made[name].manifest.quantization
    assert info is not None
    assert info.nodes == INNER
    assert sorted(info.kept_float) == sorted(ENDS)
    onnx.checker.check_model(str(made[name].model_path), full_check=True)


def test_targets_differ_in_types_and_scales(source: Artifact, made: dict[str, Artifact]) -> None:
    products = {product.weight: product for product in find_products(graph_of(source))}
    for name, kind in (("ort", np.uint8), ("portable", np.int8), ("tensorrt", np.int8)):
        graph = graph_of(made[name])
        values = constants(graph)
        several = 0
        for node in graph.node:
            if node.op_type == "QuantizeLinear":
                assert values[node.input[2]].dtype == kind
                assert kind == np.uint8 or values[node.input[2]] == 0
            if node.op_type != "DequantizeLinear" or node.input[0] not in values:
                continue
            weight, scale = values[node.input[0]], values[node.input[1]]
            assert weight.dtype == np.int8
            # uint8 by int8 in eight bits is wrong on processors without VNNI.
            assert np.abs(weight.astype(int)).max() <= (64 if name == "ort" else 127)
            if scale.ndim == 0:
                continue
            several += 1
            product = products[node.input[0].removesuffix(".q")]
            assert [a.i for a in node.attribute if a.name == "axis"] == [product.axis]
            assert scale.shape == (weight.shape[product.axis],)
            # ONNX Runtime multiplies by several scales only where the weight is a right matrix.
            assert name == "tensorrt" or (product.right and product.rank == 2)
        assert several == {"ort": 9, "portable": 9, "tensorrt": INNER}[name]


def test_dynamic_weights_have_seven_bits(made: dict[str, Artifact]) -> None:
    weights = [w for w in constants(graph_of(made["dynamic"])).values() if w.dtype == np.int8]
    matrices = [weight for weight in weights if weight.ndim > 1]
    assert matrices
    assert max(np.abs(weight.astype(int)).max() for weight in matrices) <= 64


def test_int4_takes_matrices_on_the_right(source: Artifact, made: dict[str, Artifact]) -> None:
    """`in_proj` twice and `out_proj` of three blocks; `x_proj` and `dt_proj` are stacks of two."""
    products = find_products(graph_of(source))
    matrices = {p.name for p in products if p.operator == "MatMul" and p.right and p.rank == 2}
    blocks = {n.name: n for n in graph_of(made["int4"]).node if n.op_type == "MatMulNBits"}
    assert set(blocks) == matrices
    assert len(matrices) == 9
    info = made["int4"].manifest.quantization
    assert info is not None
    assert set(info.kept_float) == {p.name for p in products} - matrices
    # What the products cost is what they cost in the float file.
    assert count_graph(made["int4"].model_path) == count_graph(source.model_path)


def test_what_was_done_is_recorded_and_what_belongs_to_it_goes_along(
    source: Artifact, made: dict[str, Artifact], folder: Path
) -> None:
    artifact = open_artifact(made["ort"].directory)
    info = artifact.manifest.quantization
    assert info is not None
    assert (info.method, info.type, info.target) == ("static", "int8", "ort")
    assert info.calibration is not None
    assert (info.calibration.method, info.calibration.seed) == ("minmax", 0)
    known = {hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.png")}
    assert len(info.calibration.images) == COUNT
    assert set(info.calibration.images) < known
    assert set(artifact.manifest.files) == set(source.manifest.files)
    assert {"model.inlined.onnx", "weights.safetensors"} <= set(artifact.manifest.files)
    for name in ("labels", "preprocessing", "schedule", "inputs", "outputs", "operators"):
        assert getattr(artifact.manifest, name) == getattr(source.manifest, name)
    assert artifact.read("weights.safetensors") == source.read("weights.safetensors")
    assert "onnxruntime" in artifact.manifest.versions


def test_the_seed_chooses_the_images(source: Artifact, folder: Path) -> None:
    spec = preprocessing_of(source)

    def chosen(seed: int) -> tuple[str, ...]:
        return choose_images(folder, spec, count=3, seed=seed).hashes

    assert chosen(0) == chosen(0)
    assert len({chosen(seed) for seed in range(4)}) > 1
    classes = {sha256_of(path): path.parent.name for path in folder.rglob("*.png")}
    hashes = choose_images(folder, spec, count=9, seed=0).hashes
    assert len({classes[one] for one in hashes[:4]}) == 2, "the first are not of one folder"


def test_the_same_request_gives_the_same_file(
    source: Artifact, made: dict[str, Artifact], folder: Path, tmp_path: Path
) -> None:
    again = vssm.quantize(source, folder, tmp_path / "out", STATIC)
    assert again.read("model.onnx") == made["ort"].read("model.onnx")
    assert again.manifest == made["ort"].manifest


def test_patterns_and_ends(source: Artifact, folder: Path, tmp_path: Path) -> None:
    request = dataclasses.replace(STATIC, count=2, keep_float=("*/out_proj/*",), ends=True)
    info = vssm.quantize(source, folder, tmp_path / "out", request).manifest.quantization
    assert info is not None
    assert list(info.kept_float) == [f"/layers.{i}/mixer/out_proj/MatMul" for i in range(3)]
    assert info.nodes == INNER + len(ENDS) - 3


def test_auto_keeps_the_noisiest_layers(
    source: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise: dict[str, float] = {}
    real = quantizing.layer_sqnr

    def recorded(*arguments: Any, **options: Any) -> dict[str, float]:
        noise.update(real(*arguments, **options))
        monkeypatch.setitem(quantizing.SENSITIVE_DB, "int8", sorted(noise.values())[2])
        return noise

    monkeypatch.setattr(quantizing, "layer_sqnr", recorded)
    request = dataclasses.replace(STATIC, keep_float=("auto",))
    made = vssm.quantize(source, folder, tmp_path / "out", request)
    assert len(noise) == INNER
    assert all(10 < decibels < 70 for decibels in noise.values())
    info = made.manifest.quantization
    assert info is not None
    assert info.nodes == INNER - 2
    assert set(sorted(noise, key=noise.__getitem__)[:2]) < set(info.kept_float)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target": "openvino"}, "target='openvino' is not one of ort, tensorrt, portable"),
    "type": ({"type": "int2"}, "type='int2' is not one of int8, int4, fp8"),
    "calibration": ({"calibration": "max"}, "calibration='max' is not one of minmax"),
    "count": ({"count": 0}, "count=0 is below 1"),
    "seed": ({"seed": -1}, "seed=-1 is below 0"),
    "int4 of activations": ({"type": "int4"}, "weights of four bits"),
    "int4 for others": (
        {"type": "int4", "method": "weights", "target": "portable"},
        "use --target ort and --weights-only",
    ),
    "fp8 for ort": ({"type": "fp8"}, "only TensorRT multiplies float8"),
    "fp8 of weights": ({"type": "fp8", "method": "weights", "target": "tensorrt"}, "float8"),
    "dynamic for tensorrt": ({"method": "dynamic", "target": "tensorrt"}, "every run"),
    "count without images": ({"method": "dynamic", "count": 4}, "count=4 with method='dynamic'"),
    "calibration without images": (
        {"method": "weights", "calibration": "entropy"},
        "calibration='entropy' with method='weights'.*leave it out",
    ),
    "auto without images": ({"method": "weights", "keep_float": ("auto",)}, "calibration images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    request = vssm.QuantizeRequest(**changes)
    given = tmp_path if request.method == "static" else None
    with pytest.raises(ValueError, match=message):
        vssm.quantize(tmp_path / "nothing here", given, tmp_path / "out", request)


@pytest.mark.parametrize("method", ["static", "weights"])
def test_images_are_given_where_they_are_used(method: str, tmp_path: Path) -> None:
    given = None if method == "static" else tmp_path
    with pytest.raises(ValueError, match="images"):
        vssm.quantize(tmp_path, given, tmp_path / "out", vssm.QuantizeRequest(method=method))


def test_a_folder_that_cannot_calibrate_is_refused(
    source: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "_quantized", None)  # the work
    empty = tmp_path / "empty"
    empty.mkdir()
    for images_of, message in (
        (empty, "holds 0 files, fewer than count=6"),
        (tmp_path / "nowhere", "is not a folder"),
        (folder / "class0/0.png", "is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            vssm.quantize(source, images_of, tmp_path / "out", STATIC)
    with pytest.raises(ValueError, match="holds 9 files, fewer than count=128"):
        vssm.quantize(source, folder, tmp_path / "out")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "class0/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        vssm.quantize(source, damaged, tmp_path / "out", dataclasses.replace(STATIC, count=9))
    for pattern, message in (("/head/gem", "fits none of the 17.*/head/Gemm"), ("*", "none of 17")):
        request = dataclasses.replace(STATIC, keep_float=(pattern,))
        with pytest.raises(ValueError, match=message):
            vssm.quantize(source, folder, tmp_path / "out", request)
    assert not (tmp_path / "out").exists()


def test_an_export_that_does_not_fit_is_refused(
    source: Artifact, made: dict[str, Artifact], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"is quantised already \(int8 static for ort\)"):
        vssm.quantize(made["ort"], folder, tmp_path / "out", STATIC)
    request = dataclasses.replace(STATIC, type="fp8", target="tensorrt")
    with pytest.raises(UnsupportedError, match="needs opset 19, but the export has 18"):
        vssm.quantize(source, folder, tmp_path / "out", request)
    half = shutil.copytree(source.directory, tmp_path / "half")
    write_manifest(half, dataclasses.replace(source.manifest, dtype="float16"))
    with pytest.raises(ArtifactError, match="half precision"):
        vssm.quantize(half, folder, tmp_path / "out", STATIC)
    with pytest.raises(ArtifactError, match="already holds an export"):
        vssm.quantize(source, folder, made["ort"].directory, STATIC)


def test_a_claim_of_quantisation_must_be_true(
    source: Artifact, made: dict[str, Artifact], tmp_path: Path
) -> None:
    false = shutil.copytree(source.directory, tmp_path / "false")
    write_manifest(
        false,
        dataclasses.replace(source.manifest, quantization=made["ort"].manifest.quantization),
    )
    with pytest.raises(ArtifactError, match="claims quantization=True, but it has False"):
        open_artifact(false)
    text = json.loads((made["weights"].directory / "model.json").read_text(encoding="utf-8"))
    text["quantization"]["method"] = "static"
    (false / "model.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(ArtifactError, match="contradict each other"):
        read_manifest(false)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("held_out"), 10, seed=7)


def test_check_judges_signal_over_noise(
    made: dict[str, Artifact], held_out: Path, cli: Run
) -> None:
    artifact = made["weights"]
    assert cli("check", artifact.directory, "--image", held_out, "--json", "-") == 0
    report = json.loads(cli.raw[: cli.raw.rindex("}") + 1])
    limits = report["limits"]
    blocks = [name for b in artifact.manifest.block_outputs for name in (b.hidden, b.residual)]
    assert [s["name"] for s in report["signals"]] == ["logits", *blocks]
    needed = [limits["logits"], *[limits["block"]] * len(blocks)]
    assert [s["needed"] for s in report["signals"]] == needed
    assert all(s["decibels"] > s["needed"] for s in report["signals"])
    assert min(report["kept_agreement"]) >= limits["kept"]
    assert report["top1_agreement"] >= limits["top1"]
    assert "signal over quantisation noise" in cli.out
    assert "at least 90%" in cli.out


def test_check_names_what_is_missing(
    made: dict[str, Artifact], held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose scales are wrong, and limits that nothing reaches."""
    images_of = held_out_images([held_out], made["ort"])
    report = vssm.check_parity(None, made["ort"], images=images_of[:2])
    assert [s.name for s in report.signals][:2] == ["logits", "block_1.hidden"]
    assert report.limits == QUANTIZED["static"]
    never = QuantizedLimits(logits=200.0, block=200.0, top1=1.1, kept=1.1)
    monkeypatch.setitem(QUANTIZED, "static", never)
    failures = vssm.check_parity(None, made["ort"], images=images_of[:2]).failures
    assert [line.partition(":")[0] for line in failures] == [
        "logits",
        "block_1.hidden",
        "top-1 agreement 100.00%, needed 110%",
        "kept positions agreed in stage 0",
        "kept positions agreed in stage 1",
    ]


def test_nan_is_no_signal() -> None:
    x = np.ones((2, 3))
    assert signal("x", x, x, 15.0).passed
    assert not signal("x", np.full_like(x, np.nan), x, -1e9).passed


def test_check_wants_images_that_prove_something(
    made: dict[str, Artifact], folder: Path, cli: Run
) -> None:
    assert cli("check", made["ort"].directory) == 2
    assert "noise says nothing about that" in cli.out
    assert cli("check", made["ort"].directory, "--image", folder) == 2
    assert "is one that the export was calibrated on" in cli.out


@pytest.mark.usefixtures("quick_rates")
@shared_traces()
def test_bench_has_the_float_twin(made: dict[str, Artifact], tmp_path: Path) -> None:
    copy = shutil.copytree(made["ort"].directory, tmp_path / "out")
    report = vssm.bench_directory(copy, batches=(1,), samples=1, torch_loop=False)
    assert [row.subject for row in report.rows] == [KERNEL, BODY, FLOAT]
    slow, fast = (dataclasses.replace(report.row(KERNEL), median_ms=ms) for ms in (9.5, 2.5))
    twin = dataclasses.replace(report.row(FLOAT), median_ms=7.25)
    assert slower_than_float([fast, twin], {FLOAT}) == []
    assert slower_than_float([slow, twin], set()) == []
    assert slower_than_float([slow, twin], {FLOAT}) == [
        "slower than ort kernel, float32 on this machine: 9.50 against 7.25 ms (batch 1, 1 thread)"
    ]
    assert "int8 static for ort" in report.context["model"]


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("ort", {"onnxruntime"}),
        ("tensorrt", {"tensorrt"}),
        ("portable", {"tensorrt", "onnxruntime"}),
        ("int4", {"onnxruntime"}),
    ],
)
def test_a_bundle_has_the_variants_that_run(
    name: str, variants: set[str], made: dict[str, Artifact], tmp_path: Path
) -> None:
    manifest = make_bundle(made[name], tmp_path / "bundle", BundleRequest())
    assert {p.name for p in (tmp_path / "bundle/triton").iterdir()} == variants
    assert all(f"triton/{v}" in manifest.absent for v in {"tensorrt", "onnxruntime"} - variants)
    report = verify_bundle(tmp_path / "bundle")
    assert report.failures == []
    assert (report.not_run == "") == ("onnxruntime" in variants)


def test_evaluate_and_run_take_it(made: dict[str, Artifact], held_out: Path, cli: Run) -> None:
    folders = made["portable"].directory
    classes = held_out.parent / "classes.txt"
    classes.write_text("\n".join(f"class{i}" for i in range(7)))
    results = ("--results", held_out.parent / "results.csv", "--batch", 5)
    assert cli("evaluate", folders, held_out, "--classes", classes, *results) == 0
    assert "top-1" in cli.out
    assert cli("run", folders, held_out / "class0/0.png") == 0


@pytest.mark.parametrize("name", ["ort", "int4", "dynamic"])
def test_no_engine_of_what_tensorrt_does_not_multiply(
    name: str, made: dict[str, Artifact], cli: Run
) -> None:
    assert cli("engine", made[name].directory, "--rtx") == 2
    assert "quantise the float export with --target tensorrt or portable" in cli.out


def test_command(source: Artifact, folder: Path, tmp_path: Path, cli: Run) -> None:
    out = tmp_path / "out"
    assert cli("quantize", source.directory, folder, "-o", out, "--count", 2, "--json", "-") == 0
    assert "quantised 15 of 17 matrix products (int8 static for ort)" in cli.out
    assert "float: /patch_embed/proj/Conv, /head/Gemm" in cli.out
    copy = shutil.copytree(source.directory, tmp_path / "w")
    assert cli("quantize", copy, "-o", copy, "--weights-only", "--force") == 0
    share = copy.joinpath("model.onnx").stat().st_size / source.model_path.stat().st_size
    assert f"{share:.2f} of the float file" in cli.out
    assert cli("quantize", source.directory, "-o", tmp_path / "x") == 2
    assert "--dynamic or --weights-only" in cli.out
    both = ("--dynamic", "--weights-only")
    assert cli("quantize", source.directory, "-o", tmp_path / "x", *both) == 2
    assert "contradict each other" in cli.out


def test_four_bits_leave_the_loggers_alone() -> None:
    """The library's module sets up logging where it is imported: its notes fill a terminal."""
    code = (
        "import logging, vssm.quantization.quantize as q; q._four_bit_quantizer()\n"
        "assert logging.getLogger().level == logging.WARNING, logging.getLogger().level\n"
        "assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
