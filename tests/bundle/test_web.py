"""`vssm bundle --web`: the page's files, its numbers beside Python's, and a browser."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from command import Run
from exports import exported, micro
from PIL import Image

import vssm
from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.artifact.manifest import Preprocessing, write_manifest
from vssm.artifact.model_file import read_facts
from vssm.bundle import web
from vssm.bundle.manifest import read_bundle_manifest
from vssm.bundle.verify import verify_bundle
from vssm.bundle.web import WebRequest, make_web_bundle
from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.evaluation.classify import classify

SOURCES = ROOT / "examples/web"
ADDRESS = "https://example.org/ort/1.30"
# A program for node: every case's pixels and settings in, the model's input out.
_PREPROCESS = """
import { readFileSync, writeFileSync } from "node:fs";
const [module, folder] = process.argv.slice(1);
const { preprocess } = await import(module);
for (const [number, { size, spec }] of JSON.parse(readFileSync(`${folder}/cases`)).entries()) {
  const { input } = preprocess(readFileSync(`${folder}/${number}`), size, spec);
  writeFileSync(`${folder}/${number}.out`, new Uint8Array(input.buffer));
}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("web"), micro())


@pytest.fixture(scope="module")
def made(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "page"
    make_web_bundle(artifact, path, WebRequest(ort_web=f"{ADDRESS}/"))
    return path


def test_what_is_in_it(made: Path, artifact: Artifact) -> None:
    files = {path.name for path in made.iterdir()}
    assert files == {
        *("MANIFEST.json", "README.md", "_headers", "app.mjs", "index.html", "model.onnx"),
        *("preprocess.mjs", "serve.py", "settings.json"),
    }
    assert (made / MODEL_FILE).read_bytes() == artifact.read(MODEL_FILE)
    settings = json.loads((made / "settings.json").read_text())
    assert settings["runtime"] == f"{ADDRESS}/ort.wasm.bundle.min.mjs"
    assert settings["labels"] == [f"class {i}" for i in range(7)]
    assert settings["stages"] == [
        {"block": 1, "output": "kept_positions_0"},
        {"block": 2, "output": "kept_positions_1"},
    ]
    grid = {"rows": 6, "columns": 6, "patch": 8, "stride": 8, "cls_position": 18}
    assert settings["grid"] == grid
    assert read_bundle_manifest(made).versions["onnxruntime-web"] == f"{ADDRESS}/"
    report = verify_bundle(made)
    assert report.passed
    assert report.not_run == "it is a page, which a browser runs"
    for path in made.iterdir():
        assert str(ROOT).encode() not in path.read_bytes()
        assert str(made.parent).encode() not in path.read_bytes()


def test_the_page_is_closed_but_to_its_runtime(made: Path) -> None:
    found = re.search(r'content="(default-src[^"]*)"', (made / "index.html").read_text())
    assert found is not None
    rules = dict(rule.strip().split(" ", 1) for rule in found[1].split(";"))
    assert rules["default-src"] == "'none'"
    opened = {name for name, sources in rules.items() if "https://example.org" in sources}
    assert opened == {"script-src", "connect-src", "worker-src"}
    assert "example.org" not in (SOURCES / "index.html").read_text()


def test_both_ways_to_send_the_headers_agree() -> None:
    said = dict(line.split(": ") for line in (SOURCES / "_headers").read_text().split("\n  ")[1:])
    sent = re.search(r"HEADERS = (\{.*?\})", (SOURCES / "serve.py").read_text(), re.S)
    assert sent is not None
    assert {name: value.strip() for name, value in said.items()} == json.loads(
        sent[1].replace(",\n}", "\n}")
    )


def test_pixels_become_what_python_makes_of_them(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine, which runs the page's JavaScript")
    random = np.random.default_rng(0)
    cases, wanted = [], []
    for height, width in ((60, 80), (48, 48), (31, 97), (301, 200), (5, 7), (1, 3)):
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for interpolation in ("bicubic", "bilinear", "nearest"):
            for resize, crop in ((53, (48, 48)), (36, (32, 21)), (48, (48, 48)), (49, (48, 48))):
                # Black and white, where filters overshoot most, in every other case.
                pixels = noise if len(cases) % 2 else np.where(noise < 128, np.uint8(0), 255)
                spec = Preprocessing(resize, crop, interpolation)
                pixels.astype(np.uint8).tofile(tmp_path / str(len(cases)))
                cases.append({"size": [height, width], "spec": dataclasses.asdict(spec)})
                wanted.append(vssm.preprocess(pixels.astype(np.uint8), spec)[0])
    (tmp_path / "cases").write_text(json.dumps(cases))
    module = (SOURCES / "preprocess.mjs").as_uri()
    command = [node, "--input-type=module", "--eval", _PREPROCESS, module, str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    for number, (case, want) in enumerate(zip(cases, wanted, strict=True)):
        got = np.fromfile(tmp_path / f"{number}.out", np.float32).reshape(want.shape)
        np.testing.assert_array_equal(got, want, err_msg=str(case))


def _npm(folder: Path, script: str) -> str:
    """A PATH with an npm of our own before all else."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\n{script}")
    (folder / "npm").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def _archive(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


_PACK = """
import pathlib, sys
assert sys.argv[1:3] == ["pack", "onnxruntime-web@{version}"], sys.argv
pathlib.Path(sys.argv[-1], "some.tgz").write_bytes({archive!r})
"""


def test_npm_brings_the_runtime(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {web._SCRIPT: b"script", web._BINARY: b"binary"}
    script = _PACK.format(version=web.ORT_WEB_VERSION, archive=_archive(**files))
    monkeypatch.setenv("PATH", _npm(tmp_path / "bin", script))
    manifest = make_web_bundle(artifact, tmp_path / "page", WebRequest())
    assert {p.name: p.read_bytes() for p in (tmp_path / "page/ort").iterdir()} == files
    assert manifest.versions["onnxruntime-web"] == web.ORT_WEB_VERSION
    settings = json.loads((tmp_path / "page/settings.json").read_text())
    assert settings["runtime"] == "./ort/ort.wasm.bundle.min.mjs"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('npm error code E404')", "npm error code E404"),
        ("pass", "StopIteration"),
        (_PACK.format(version=web.ORT_WEB_VERSION, archive=b"no archive"), "not a gzip file"),
        (_PACK.format(version=web.ORT_WEB_VERSION, archive=_archive()), "not found"),
    ],
)
def test_npm_that_brings_nothing(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setenv("PATH", _npm(tmp_path / "bin", script))
    with pytest.raises(RuntimeUnavailableError, match=rf"npm cannot bring .*{reason}.*--ort-web"):
        make_web_bundle(artifact, tmp_path / "page", WebRequest())
    assert not (tmp_path / "page").exists()


def test_options_are_refused_before_any_work(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    none, out = tmp_path / "none", tmp_path / "page"  # neither is there
    for options, message in (
        (["--web"], "npm is not on PATH; it downloads onnxruntime-web 1.30.0"),
        (["--web", "--ort-web=cdn"], "ort_web='cdn' is not an address of a folder; write https://"),
        (["--web", "--ort-web=https://a;b"], "is not an address of a folder"),
        (["--web", "--batch=1,2,4"], "batch=1,2,4 with --web, which has no server"),
        (["--ort-web=https://a/b"], "without --web, which makes the page that loads it"),
    ):
        assert cli("bundle", none, "-o", out, *options) == 2
        assert message in cli.out
    assert cli("bundle", none, "--verify", "--web") == 2
    assert "web=True with --verify, which makes no bundle" in cli.out
    assert list(tmp_path.iterdir()) == []


def _changed(artifact: Artifact, **changes: object) -> Artifact:
    return Artifact(artifact.directory, dataclasses.replace(artifact.manifest, **changes))


def test_models_that_no_page_runs(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, page = WebRequest(ort_web=ADDRESS), tmp_path / "page"
    maps = tuple(dataclasses.replace(o, shape=(*o.shape, 4, 4)) for o in artifact.manifest.outputs)
    spec = Preprocessing(48, (48, 48), fit="pad")
    for changes, message in (
        ({"outputs": maps}, r"so images cannot be classified by it"),
        ({"preprocessing": None}, r"does not say how images are prepared"),
        ({"preprocessing": spec}, r"fit='pad': the page prepares images by cropping"),
    ):
        with pytest.raises(ValueError, match=message):
            make_web_bundle(_changed(artifact, **changes), page, request)
    with pytest.raises(UnsupportedError, match="is in bfloat16"):
        make_web_bundle(_changed(artifact, dtype="bfloat16"), page, request)
    monkeypatch.setattr(web, "MAX_MODEL", 1 << 10)
    with pytest.raises(UnsupportedError, match=r"a page's model may have 0: take a smaller model"):
        make_web_bundle(artifact, page, request)
    assert not page.exists()


def test_operators_alone_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(artifact.model_path)
    del model.functions[:]
    data = model.SerializeToString()
    assert read_facts(data).bodies == frozenset()
    (tmp_path / MODEL_FILE).write_bytes(data)
    files = {MODEL_FILE: hashlib.sha256(data).hexdigest()}
    manifest = dataclasses.replace(artifact.manifest, files=files)
    write_manifest(tmp_path, manifest)
    with pytest.raises(UnsupportedError, match=r"has the operator \w+ without its function"):
        make_web_bundle(Artifact(tmp_path, manifest), tmp_path / "page", WebRequest(None, ADDRESS))


DIGITS = [
    *("vim_tiny", "--num-classes=10", "--schedule=2:0.75,4:0.75", "--inline"),
    *("--set=image_size=32", "--set=patch_size=4", "--set=stride=4"),
    *("--set=depth=6", "--set=d_model=64", "--set=d_state=8"),
    f"--checkpoint={ROOT / 'examples/vim_digits.safetensors'}",
]


@pytest.mark.slow  # an export, a download of 33 MB, and a browser
def test_a_browser_runs_the_page(cli: Run, tmp_path: Path) -> None:
    import browser

    export, page = tmp_path / "out", tmp_path / "page"
    assert cli("export", *DIGITS, "-o", export) == 0, cli.out
    try:
        assert cli("bundle", export, "--web", "-o", page) == 0
    except AssertionError:
        if "npm" in cli.out:
            pytest.skip(f"no onnxruntime-web here: {cli.out}")
        raise
    assert (page / MODEL_FILE).read_bytes() == (export / "model.inlined.onnx").read_bytes()
    command = [sys.executable, str(page / "serve.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            with browser.opened(server.stdout.readline().strip()) as opened:
                _look(opened, export, tmp_path)
        finally:
            server.kill()


def _look(opened: object, export: Path, folder: Path) -> None:
    import browser

    assert isinstance(opened, browser.Page)
    opened.resize(1000, 640)
    opened.wait_for("document.getElementById('status').textContent === 'Ready.'")
    assert opened.evaluate("crossOriginIsolated")
    cores = min(len(os.sched_getaffinity(0)), 8)
    said = opened.evaluate("document.getElementById('facts').textContent")
    assert re.search(rf"SIMD, {cores} thread", said), said
    # Another size than the crop, so that it is resized, and colours.
    digit = Image.open(ROOT / "examples/data/digit_7.png").convert("RGB").resize((150, 131))
    turned = Image.Exif()
    turned[0x0112] = 6  # Exif's orientation, which nobody obeys
    digit.save(folder / "digit.jpg", exif=turned)
    digit.save(folder / "digit.png")
    for image in (folder / "digit.jpg", folder / "digit.png"):
        opened.choose("#file", image)
        opened.wait_for(f"document.getElementById('status').textContent.includes('{image.name}: ')")
        assert opened.errors == []
        rows = opened.evaluate(_ROWS)
        (result,), _ = classify(export, [image], "ort-cpu", top=5)
        for row, wanted in zip(rows, result["predictions"], strict=True):
            label, share = row.split("\n")[:2]
            assert label == f"class {wanted['class']}"
            assert abs(float(share.removesuffix(" %")) - 100 * wanted["probability"]) < 0.06
    with vssm.open_session(export) as session:
        outputs = session.run(vssm.preprocess(folder / "digit.png", export))
    kept = {p - (p > 32) for p in map(int, outputs["kept_positions_1"][0]) if p != 32}
    alpha = opened.evaluate(_ALPHA)
    assert {place for place, value in enumerate(alpha) if value == 0} == kept
    assert f"after block 4: {len(kept)} of 64 patches" in opened.evaluate(
        "document.getElementById('stages').innerText"
    )
    picture = Image.open(io.BytesIO(opened.picture()))
    assert picture.size == (1000, 640)
    assert len(picture.convert("L").getcolors() or []) > 50  # neither blank nor an error in words
    needed = "document.documentElement.scrollWidth"
    opened.resize(400, 800)
    assert opened.evaluate(needed) <= 400


_ROWS = "[...document.querySelectorAll('#top li')].map((row) => row.innerText)"
# What lies over the middle of each patch.
_ALPHA = """[...Array(64).keys()].map((place) =>
  document.getElementById("patches").getContext("2d")
    .getImageData((place % 8) * 4 + 2, Math.floor(place / 8) * 4 + 2, 1, 1).data[3])"""
