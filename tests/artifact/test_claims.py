"""model.json against the files it speaks of: hashes, claims, files beside the model, exchanges."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Run
from exports import exported, images, micro
from onnx.external_data_helper import convert_model_to_external_data

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.errors import ArtifactError
from vssm.files.atomic import sha256_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("made"), micro(), inline=True)


@pytest.fixture
def folder(made: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.directory, tmp_path / "out"))


def edit(folder: Path, path: str, value: Any) -> None:
    """Set one field of model.json, and bring the hashes up to date."""
    document = json.loads((folder / "model.json").read_text())
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    target = document
    for parent in parents:
        target = target[parent]
    target[last] = value
    for name in document["files"]:
        document["files"][name] = sha256_of(folder / name)
    (folder / "model.json").write_text(json.dumps(document))


def test_hashes(folder: Path) -> None:
    weights, manifest = folder / "weights.safetensors", open_artifact(folder).manifest
    weights.write_bytes(b"weighty")
    open_artifact(folder, only=["model.onnx"])
    with pytest.raises(ArtifactError) as caught:
        open_artifact(folder)
    expected = (str(weights), manifest.files[weights.name][:12], sha256_of(weights)[:12])
    for part in (*expected, "export the model again"):
        assert part in str(caught.value)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors cannot be read .*lists it"):
        open_artifact(folder)
    with pytest.raises(ArtifactError, match=r"file=other\.bin is not listed in"):
        open_artifact(folder, only=["other.bin"])


CLAIMS = [
    ("dtype", "float16", r"claims weights of half precision=\['float16'\], but it has \[\]"),
    ("opset", 19, "claims opset=19, but it has 18"),
    ("operators", {}, r"claims operators=\[\], but it has \['GatedSelectiveScan', 'SelectiveScan'"),
    ("operators", {"SelectiveScan": 1}, "claims operators="),
    ("operators", {"SelectiveScan": 1, "TokenGather": 1, "TokenGather1": 1}, "claims operators="),
    ("operators/SelectiveScan", 2, r"claims operators\.SelectiveScan=2, but it has 1"),
    ("inputs/0/name", "pixels", "claims inputs="),
    ("inputs/0/shape", [1, 3, 48, 48], "claims inputs="),
    ("outputs/1/name", "kept", "claims outputs="),
    ("outputs/1/shape", ["batch", 26], "claims outputs="),
    ("outputs/1/dtype", "int32", "claims outputs="),
]


@pytest.mark.parametrize(("path", "value", "message"), CLAIMS)
def test_claims_that_the_model_does_not_hold(
    cli: Run, folder: Path, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    edit(folder, path, value)
    for use in (open_artifact, vssm.open_session):
        with pytest.raises(ArtifactError, match=message):
            use(folder)
    assert cli("bundle", folder, "-o", tmp_path / "bundle") == 2
    assert "model.json was edited, or is of another model" in cli.out
    assert not (tmp_path / "bundle").exists()


def test_outputs_left_out_or_exchanged(folder: Path) -> None:
    outputs = json.loads((folder / "model.json").read_text())["outputs"]
    for claimed in (outputs[:2], [outputs[0], outputs[2], outputs[1]]):
        edit(folder, "outputs", claimed)
        with pytest.raises(ArtifactError, match="claims outputs="):
            vssm.open_session(folder)


def test_an_inlined_file_is_held_against_it_too(folder: Path) -> None:
    shutil.copyfile(folder / "model.onnx", folder / "model.inlined.onnx")
    edit(folder, "opset", 18)
    with pytest.raises(
        ArtifactError, match=r"model\.inlined\.onnx: model\.json claims operators=\[\]"
    ):
        open_artifact(folder)


def put_outside(folder: Path, location: str) -> None:
    """Move model.onnx's weights to a file that it names `location`."""
    model = onnx.load(folder / "model.onnx")
    convert_model_to_external_data(model, location="weights.bin", size_threshold=1024)
    onnx.save(model, folder / "model.onnx")
    if location != "weights.bin":
        shutil.move(folder / "weights.bin", folder / location)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "./x/../weights.bin"])
def test_weights_in_a_file_that_is_not_listed(
    cli: Run, folder: Path, tmp_path: Path, location: str
) -> None:
    (folder / "x").mkdir()
    put_outside(folder, location)
    edit(folder, "opset", 18)
    for use in (open_artifact, vssm.open_session):
        with pytest.raises(ArtifactError, match=r"keeps weights in '.*bin', which model.json"):
            use(folder)
    assert cli("bundle", folder, "-o", tmp_path / "bundle") == 2


def test_weights_in_a_file_that_is_listed(made: Artifact, folder: Path) -> None:
    x = images(micro(), 1)
    put_outside(folder, "weights.bin")
    edit(folder, "files/weights.bin", "")
    for backend in ("kernel", "body"):
        with vssm.open_session(made) as inside, vssm.open_session(folder, backend=backend) as out:
            np.testing.assert_allclose(
                out.run(x)["logits"], inside.run(x)["logits"], rtol=1e-5, atol=1e-5
            )
    with (folder / "weights.bin").open("r+b") as file:
        file.write(b"\1")
    for use in (open_artifact, vssm.open_session):
        with pytest.raises(ArtifactError, match=r"weights\.bin has sha256"):
            use(folder)


_SWAP = """
import os, sys
target, other = sys.argv[1:]
while True:
    for path in (other + ".1", other + ".2"):
        os.link(path, target + ".next")
        os.replace(target + ".next", target)
"""


def test_a_swapped_model_never_runs(tmp_path: Path) -> None:
    """Another process exchanges model.onnx all the time: the right one opens, or none."""
    x = images(micro(), 1)
    folder = exported(tmp_path, micro(None, depth=1)).directory
    with vssm.open_session(folder, threads=1) as session:
        want = session.run(x)["logits"]
    model = onnx.load(folder / "model.onnx")
    head = next(t for t in model.graph.initializer if t.name == "head.bias")
    head.CopyFrom(onnx.numpy_helper.from_array(np.full(7, 1e3, np.float32), head.name))
    onnx.save(model, tmp_path / "model.2")
    shutil.copyfile(folder / "model.onnx", tmp_path / "model.1")
    command = [sys.executable, "-c", _SWAP, str(folder / "model.onnx"), str(tmp_path / "model")]
    swapping = subprocess.Popen(command)
    refused = opened = 0
    try:
        while opened + refused < 200 or not (opened and refused):
            refused += 1
            with contextlib.suppress(ArtifactError):
                session = vssm.open_session(folder, threads=1)
                refused, opened = refused - 1, opened + 1
                with session:
                    np.testing.assert_array_equal(session.run(x)["logits"], want)
    finally:
        swapping.kill()
        swapping.wait()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.json", "model.onnx", "weights.safetensors"])
def test_pipes_and_devices_are_refused_at_once(cli: Run, folder: Path, name: str) -> None:
    path = folder / name
    path.unlink()
    os.mkfifo(path)
    assert cli("check", folder) == 2
    assert "a named pipe, not a regular file" in cli.out
    path.unlink()
    path.symlink_to("/dev/zero")
    assert cli("check", folder) == 2
    assert "a device, not a regular file" in cli.out


def _safetensors(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}
    header = json.dumps({"input": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", _safetensors(dtype="F9"), _safetensors(dtype="F4"), _safetensors(shape=[2])),
        _safetensors(shape=[1] * 70),
        _safetensors(dtype="F4", shape=[8]),
    ],
)
def test_weights_that_are_listed_and_damaged(cli: Run, folder: Path, data: bytes) -> None:
    (folder / "weights.safetensors").write_bytes(data)
    edit(folder, "opset", 18)
    assert cli("check", folder) == 2
    assert "weights.safetensors does not fit the model" in cli.out
