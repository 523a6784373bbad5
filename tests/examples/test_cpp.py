"""The C++ examples: compiled, and run where their runtime is; beside the Python session."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from checkout import ROOT
from exports import exported, micro, micro_segmenter
from PIL import Image

import vssm
from vssm.artifact.data_sets import voc_colours
from vssm.artifact.directory import Artifact
from vssm.native_library import find_library

SOURCES = ROOT / "examples/cpp"
# Printed with six decimals; float32 by two programs.
SAME = 2e-6


def build(folder: Path, *options: str) -> Path:
    """Configure and build the examples; the folder of the programs."""
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", *options],
        ["cmake", "--build", str(folder), "-j1"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower()
    return folder


def ort_library() -> Path:
    """The ONNX Runtime library inside the Python package."""
    (path,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    return build(folder, f"-DONNXRUNTIME_LIBRARY={ort_library()}")


@pytest.fixture(scope="module")
def program(programs: Path) -> Path:
    return programs / "ort_classify"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("exported"), micro())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo whose shorter side is as long as the preprocessing wants it: 54 for a crop of 48."""
    path = tmp_path / "photo.ppm"
    pixels = np.random.default_rng(3).integers(0, 256, (54, 77, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [*map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_ort_classify(program: Path, artifact: Artifact, photo: Path, backend: str) -> None:
    library = find_library() if backend == "kernel" else "-"
    status, shown, errors = run(program, artifact.model_path, library, photo)
    assert (status, errors) == (0, "")
    with vssm.open_session(artifact, backend=backend) as session:
        logits = session.run(vssm.preprocess(photo, artifact))["logits"][0].astype(np.float64)
    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-share, kind="stable")[:5]
    lines = [line.split() for line in shown.splitlines()]
    assert [int(index) for index, _ in lines] == list(order)
    got = np.array([float(value) for _, value in lines])
    np.testing.assert_allclose(got, share[order], rtol=0, atol=SAME)


def test_ort_classify_refuses(
    program: Path, artifact: Artifact, photo: Path, tmp_path: Path
) -> None:
    assert run(program)[0] == 2
    small = tmp_path / "small.ppm"
    Image.new("RGB", (40, 60)).save(small)
    cut = tmp_path / "cut.ppm"
    cut.write_bytes(photo.read_bytes()[:-1])
    text = tmp_path / "text.ppm"
    text.write_text("no image")
    huge = tmp_path / "huge.ppm"
    huge.write_text("P6 99999999999 99999999999 255\n")
    model = artifact.model_path
    for arguments, message in [
        ((model, "/nowhere.so", photo), "Failed to load library /nowhere.so"),
        ((text, "-", photo), "error: "),
        ((model, "-", small), "is smaller than the model's input"),
        ((model, "-", cut), "ends too early"),
        ((model, "-", text), "is no binary PPM"),
        ((model, "-", huge), "is no binary PPM"),
        ((model, "-", tmp_path / "absent.ppm"), "is no binary PPM"),
    ]:
        status, shown, errors = run(program, *arguments)
        assert (status, shown) == (2, "")
        assert message in errors


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The export that tests/onnx/test_segmenters.py makes too."""
    model = micro_segmenter("vim_small", "1:0.8,3:0.7", {}, num_classes=7)
    return exported(tmp_path_factory.mktemp("segmenter"), model, outputs="labels", dtype="float32")


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Its shorter side is as the preprocessing wants it: 96, for an input of 64 x 96."""
    path = tmp_path / "street.ppm"
    pixels = np.random.default_rng(5).integers(0, 256, (96, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_ort_segment(
    programs: Path, segmenter: Artifact, street: Path, tmp_path: Path, backend: str
) -> None:
    library = find_library() if backend == "kernel" else "-"
    files = (tmp_path / "labels.pgm", tmp_path / "overlay.ppm")
    found = run(programs / "ort_segment", segmenter.model_path, library, street, *files)
    assert found == (0, "", "")
    with vssm.open_session(segmenter, backend=backend) as session:
        labels = session.run(vssm.preprocess(street, segmenter))["labels"][0]
    assert (_pixels(files[0]) == labels).all()
    assert len(np.unique(labels)) > 2
    # 32 rows and 35 columns are cropped; a half of a pixel goes to the even side.
    middle = _pixels(street)[16:80, 18:114]
    assert (_pixels(files[1]) == (middle + np.array(voc_colours(7))[labels]) // 2).all()


def test_ort_segment_with_a_palette(
    programs: Path, segmenter: Artifact, street: Path, tmp_path: Path
) -> None:
    palette = tmp_path / "palette.txt"
    files = (tmp_path / "labels.pgm", tmp_path / "overlay.ppm")
    arguments = (programs / "ort_segment", segmenter.model_path, "-", street, *files, palette)
    colours = np.arange(21).reshape(7, 3) * 12
    lines = [f"{r} {g} {b} a name of {r}\n" for r, g, b in colours]
    palette.write_text("".join(lines))
    assert run(*arguments) == (0, "", "")
    middle = _pixels(street)[16:80, 18:114]
    assert (_pixels(files[1]) == (middle + colours[_pixels(files[0])]) // 2).all()
    for text, message in [
        (lines[0], " has no colour; give another palette, of the model's bundle"),
        ("red green blue\n", "is no palette"),
        ("", "is no palette"),
    ]:
        palette.write_text(text)
        status, shown, errors = run(*arguments)
        assert (status, shown) == (2, "")
        assert message in errors


def test_ort_segment_refuses(
    programs: Path, artifact: Artifact, segmenter: Artifact, photo: Path, street: Path
) -> None:
    program, files = programs / "ort_segment", ("/nowhere/l.pgm", "/nowhere/o.ppm")
    assert run(program, segmenter.model_path, "-", street)[0] == 2
    for arguments, message in [
        ((artifact.model_path, "-", photo), "labels"),  # a classifier has no such output
        ((segmenter.model_path, "-", street), "/nowhere/l.pgm cannot be written"),
    ]:
        status, shown, errors = run(program, *arguments, *files)
        assert (status, shown) == (2, "")
        assert message in errors


def test_ort_classify_with_the_official_header(tmp_path: Path) -> None:
    folder = os.environ.get("ORT_INCLUDE_DIR")
    if not folder:
        pytest.skip("no onnxruntime_c_api.h: set ORT_INCLUDE_DIR to its folder")
    build(tmp_path, f"-DONNXRUNTIME_LIBRARY={ort_library()}", f"-DORT_INCLUDE_DIR={folder}")


def test_tensorrt_classify_compiles(tmp_path: Path) -> None:
    folder = os.environ.get("TENSORRT_ROOT")
    if not folder:
        pytest.skip("no NvInferRuntime.h: set TENSORRT_ROOT to the TensorRT SDK")
    build(tmp_path, f"-DTENSORRT_ROOT={folder}")


def test_without_a_runtime_both_are_left_out(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-G", "Ninja"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "left out: ort_classify, ort_segment (set ONNXRUNTIME_LIBRARY)" in shown
    assert "left out: tensorrt_classify (set TENSORRT_ROOT)" in shown


def test_they_stay_short() -> None:
    for path in SOURCES.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 150, path
