"""Weights beside model.onnx, as a model above 2 GiB has them; here from the first byte on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command import Run
from exports import exported, images, micro, shared_traces

import vssm
from vssm.artifact.directory import EXTERNAL_FILE, Artifact, open_artifact
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.verify import verify_bundle
from vssm.errors import ArtifactError
from vssm.files.atomic import sha256_of

X = images(micro(), 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """The same model with its weights inside, and beside."""
    folder, model = tmp_path_factory.mktemp("external"), micro()
    inside = exported(folder / "inside", model)
    return inside, exported(folder, model, inline=True, external_data_above=0)


def run(artifact: Any, **options: Any) -> dict[str, np.ndarray]:
    with vssm.open_session(artifact, **options) as session:
        return dict(session.run(X))


def test_the_file_is_listed_and_holds_the_weights(pair: tuple[Artifact, Artifact]) -> None:
    inside, out = pair
    path = out.directory / EXTERNAL_FILE
    assert out.manifest.files[EXTERNAL_FILE] == sha256_of(path)
    assert EXTERNAL_FILE not in inside.manifest.files
    sizes = [(a.directory / "model.onnx").stat().st_size for a in pair]
    assert sizes[1] + path.stat().st_size >= 0.9 * sizes[0]
    assert sizes[1] < 0.6 * sizes[0]
    for name in ("model.onnx", "model.inlined.onnx"):
        onnx.checker.check_model(str(out.directory / name), full_check=True)
    assert open_artifact(out).model_files() == ["model.inlined.onnx", "model.onnx", EXTERNAL_FILE]


def test_every_way_to_run_it(cli: Run, pair: tuple[Artifact, Artifact]) -> None:
    inside, out = pair
    for backend in ("kernel", "body"):
        want, got = run(inside, backend=backend), run(out, backend=backend)
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    import onnxruntime

    inlined = onnxruntime.InferenceSession(
        out.directory / "model.inlined.onnx", providers=["CPUExecutionProvider"]
    )
    logits = inlined.run(["logits"], {"images": X})[0]
    np.testing.assert_array_equal(logits, run(out, backend="body")["logits"])
    assert cli("check", out.directory, "--per-block") == 0, cli.out


def test_a_bundle_of_it(pair: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = make_bundle(pair[1], bundle, BundleRequest())
    assert f"model/{EXTERNAL_FILE}" in manifest.files
    assert f"triton/onnxruntime/vim_tiny/1/{EXTERNAL_FILE}" in manifest.files
    report = verify_bundle(bundle)
    assert report.passed, report.failures
    assert report.kernels == 8


def test_a_changed_byte_of_it(pair: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    out = exported(tmp_path, micro(), external_data_above=0)
    with (out.directory / EXTERNAL_FILE).open("r+b") as file:
        file.write(b"\1")
    for use in (open_artifact, vssm.open_session):
        with pytest.raises(ArtifactError, match=r"model\.onnx\.data has sha256"):
            use(out)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data has sha256"):
        make_bundle(out, tmp_path / "bundle", BundleRequest())


def test_force_takes_it_away_again(pair: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    exported(tmp_path, micro(), external_data_above=0)
    with shared_traces():
        vssm.export(micro(), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / EXTERNAL_FILE).exists()
    assert EXTERNAL_FILE not in json.loads((tmp_path / "out/model.json").read_text())["files"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_above_2_gib_by_itself(tmp_path: Path) -> None:
    """560 million weights: a minute, 2.2 GB of disk and 7.3 GB of memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    if shutil.disk_usage(tmp_path).free < 5e9 or free < 9e9:
        pytest.skip("needs 5 GB of disk and 9 GB of memory")
    sizes = {"image_size": 32, "patch_size": 8, "stride": 8, "depth": 9, "d_model": 3072}
    schedule = vssm.PruneSchedule({3: 0.7})
    model = vssm.create_model("vim_tiny", schedule=schedule, num_classes=7, **sizes)
    artifact = vssm.export(model, tmp_path / "out", weights=False)
    assert (artifact.directory / EXTERNAL_FILE).stat().st_size > 1 << 31
    x = images(model, 1)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    with vssm.open_session(artifact, threads=1) as session:
        # 2.0e-6 of the largest measured.
        np.testing.assert_allclose(session.run(x)["logits"], want, atol=2e-5, rtol=0)
