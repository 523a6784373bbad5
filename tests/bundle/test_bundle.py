"""`vssm bundle`: what is in it, what a server would read, and what `--verify` finds."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run
from exports import exported, micro
from PIL import Image
from triton_server import ask, serving, triton_schema

import vssm
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import TensorInfo
from vssm.bundle import manifest as bundle_manifest
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.manifest import BUNDLE_MANIFEST, read_bundle_manifest
from vssm.bundle.triton import (
    ServingOptions,
    onnxruntime_config,
    read_served_name,
    tensorrt_config,
)
from vssm.bundle.verify import verify_bundle
from vssm.errors import ArtifactError, UnsupportedError
from vssm.native_library import find_library
from vssm.runtimes.library import find_sources

NAME = "vim_tiny"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("bundle"), micro())


@pytest.fixture(scope="module")
def made(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bundle"
    make_bundle(artifact, path, BundleRequest(serving=ServingOptions(batch=(1, 2, 4))))
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_what_is_in_it(made: Path) -> None:
    manifest = read_bundle_manifest(made)
    everything = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert set(manifest.files) | {BUNDLE_MANIFEST} == everything
    assert everything >= {
        *("Dockerfile", "README.md", "bundle.env", "client.py", "start.sh"),
        *("model/model.onnx", "model/model.json", "lib/libvssm_onnxruntime.so"),
        *(f"triton/{kind}/{NAME}/config.pbtxt" for kind in ("tensorrt", "onnxruntime")),
        *(f"triton/{kind}/{NAME}/labels.txt" for kind in ("tensorrt", "onnxruntime")),
        f"triton/onnxruntime/{NAME}/1/model.onnx",
        *("sources/CMakeLists.txt", "sources/exporter/vssm/_version.py"),
        "sources/plugins/kernels/cuda/scan.cu",
    }
    assert not [name for name in everything if name.endswith((".plan", ".safetensors", ".pyc"))]
    assert not [name for name in everything if "emulation" in name]
    assert any(name.endswith("model.plan") for name in manifest.absent)
    for name in everything:
        assert str(Path.home()) not in name


def test_no_path_of_this_machine(made: Path) -> None:
    roots = [str(find_sources()).encode(), str(made.parent).encode()]
    for path in made.rglob("*"):
        if path.is_file() and path.suffix != ".so":
            assert not [root for root in roots if root in path.read_bytes()], path


def test_the_model_opens_from_inside(made: Path, artifact: Artifact) -> None:
    x = np.zeros((1, 3, 48, 48), np.float32)
    with vssm.open_session(made / "model") as ours, vssm.open_session(artifact) as theirs:
        np.testing.assert_array_equal(ours.run(x)["logits"], theirs.run(x)["logits"])


def test_verify_runs_the_model(cli: Run, bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "moved")
    assert cli("bundle", "--verify", moved, "--json", tmp_path / "report.json") == 0, cli.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kernels"] == 8  # three scans and convolutions, two gathers
    assert 0 < report["difference"] < 1e-4
    assert report["failures"] == []
    assert "passed" in cli.out


def _missing(bundle: Path) -> None:
    (bundle / "start.sh").unlink()


def _extra(bundle: Path) -> None:
    (bundle / "lib/extra.so").write_bytes(b"code")


def _changed(bundle: Path) -> None:
    with (bundle / "lib/libvssm_onnxruntime.so").open("ab") as file:
        file.write(b"\0")


def _setuid(bundle: Path) -> None:
    (bundle / "start.sh").chmod(0o4755)


def _writable(bundle: Path) -> None:
    (bundle / "lib").chmod(0o777)


def _manifest_mode(bundle: Path) -> None:
    (bundle / BUNDLE_MANIFEST).chmod(0o666)


def _folder(bundle: Path) -> None:
    (bundle / "lib/new/empty").mkdir(parents=True)
    for folder in ("new", "new/empty"):
        (bundle / "lib" / folder).chmod(0o755)


def _hidden(bundle: Path) -> None:
    (bundle / ".hidden\x1b[2J").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_setuid, "start.sh was changed: its mode is 4755, not 0644"),
        (_writable, "lib was changed: its mode is 0777, not 0755"),
        (_manifest_mode, "MANIFEST.json was changed: its mode is 0666, not 0644"),
        (_folder, "lib/new, a directory, is not listed"),
        (_hidden, r".hidden\x1b[2J is not listed"),
        (_missing, "start.sh is missing"),
        (_extra, "lib/extra.so is not listed"),
        (_changed, "lib/libvssm_onnxruntime.so was changed: its sha256 is"),
    ],
)
def test_verify_finds(cli: Run, bundle: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(bundle)
    assert cli("bundle", "--verify", bundle) == 1
    assert f"failed: {message}" in cli.out
    assert "the model was not run: files differ" in cli.out


@pytest.mark.parametrize("target", ["/etc/hostname", "lib", "nowhere"])
def test_verify_refuses_links(bundle: Path, target: str) -> None:
    (bundle / "link").symlink_to(target)
    with pytest.raises(ArtifactError, match="is a link or no regular file"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", [BUNDLE_MANIFEST, "start.sh"])
def test_verify_refuses_a_pipe(cli: Run, bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert cli("bundle", "--verify", bundle) == 2
    assert "regular file" in cli.out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_verify_finds_another_owner(bundle: Path) -> None:
    os.chown(bundle / "lib/libvssm_onnxruntime.so", 12345, -1)
    (failure,) = verify_bundle(bundle).failures
    assert "libvssm_onnxruntime.so was changed: it belongs to user 12345, the bundle" in failure


def _edited(bundle: Path, changes: dict[str, Any], *, own: bool) -> None:
    """Edit MANIFEST.json; `own`: also the hash that it gives for itself."""
    path = bundle / BUNDLE_MANIFEST
    document = {**json.loads(path.read_text()), **changes}
    if own:
        document["sha256"] = bundle_manifest._own_sha256(document)
    path.write_text(json.dumps(document))


EDITS = [
    ({"name": "other"}, "says name other, but there is no triton/tensorrt/other/config.pbtxt"),
    ({"versions": {"vssm": "9.9"}}, "says versions {}, but model/model.json {'"),
]


@pytest.mark.parametrize(("changes", "message"), EDITS)
def test_verify_finds_an_edited_manifest(
    bundle: Path, changes: dict[str, Any], message: str
) -> None:
    _edited(bundle, changes, own=False)
    with pytest.raises(ArtifactError, match="its content does not have the sha256 that it gives"):
        verify_bundle(bundle)
    _edited(bundle, changes, own=True)
    (failure,) = verify_bundle(bundle).failures
    assert message in failure


def test_keys_that_come_twice(bundle: Path) -> None:
    path = bundle / BUNDLE_MANIFEST
    path.write_text(path.read_text().replace('"name":', '"name": "other", "name":'))
    with pytest.raises(ArtifactError, match="the key 'name' comes twice"):
        verify_bundle(bundle)


def test_what_was_hashed_is_what_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and library exchanged as soon as the files were compared: neither is run."""
    from vssm.bundle import verify as bundle_verify

    real = bundle_verify.run_once

    def exchanging(model: Path, images: Any, library: Path | None) -> Any:
        for name in ("model/model.onnx", "lib/libvssm_onnxruntime.so", "model/model.json"):
            (bundle / name).write_bytes(b"something else")
        return real(model, images, library)

    monkeypatch.setattr(bundle_verify, "run_once", exchanging)
    report = verify_bundle(bundle)
    assert report.passed
    assert report.kernels == 8


@pytest.mark.parametrize("name", ["lib/libvssm_onnxruntime.so", "model/model.json"])
def test_a_file_changed_after_it_was_hashed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from vssm.bundle import verify as bundle_verify

    real = bundle_verify.compare_files

    def comparing(directory: Path, manifest: Any) -> list[str]:
        found = real(directory, manifest)
        (bundle / name).write_bytes(b"something else")
        return found

    monkeypatch.setattr(bundle_verify, "compare_files", comparing)
    with pytest.raises(ArtifactError, match=r"is not the file that|was changed while"):
        verify_bundle(bundle)


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_modes_do_not_depend_on_the_umask(artifact: Artifact, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_bundle(artifact, tmp_path / "bundle", BundleRequest())
    finally:
        os.umask(before)
    assert verify_bundle(tmp_path / "bundle").passed


def test_verify_finds_a_library_of_something_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.bundle import verify as bundle_verify

    real = bundle_verify.run_once

    def wrong(model: Path, images: Any, library: Path | None) -> Any:
        ran = real(model, images, library)
        if library is None:
            return ran
        return dataclasses.replace(ran, kernels=0, outputs={"logits": -ran.outputs["logits"]})

    monkeypatch.setattr(bundle_verify, "run_once", wrong)
    failures = verify_bundle(bundle).failures
    assert [f.partition(" ")[0] for f in failures] == ["libvssm_onnxruntime.so", "logits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"../model.onnx": "a" * 64}}, "'../model.onnx'"),
        ({"files": {"/etc/passwd": "a" * 64}}, "'/etc/passwd'"),
        ({"files": {"a//b": "a" * 64}}, "'a//b'"),
        ({"files": {}}, "at least 1 members"),
        ({"format_version": 2}, "format_version=2 is newer than 1"),
    ],
)
def test_damaged_manifests(bundle: Path, changes: dict[str, Any], message: str) -> None:
    path = bundle / BUNDLE_MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError, match=re.escape(message)):
        verify_bundle(bundle)


def test_what_may_be_replaced(cli: Run, bundle: Path, artifact: Artifact, tmp_path: Path) -> None:
    make = ("bundle", artifact.directory, "-o", bundle)
    assert cli(*make) == 2
    assert "is not overwritten unasked" in cli.out
    assert cli(*make, "--force", "--name", "other") == 0, cli.out
    assert read_bundle_manifest(bundle).name == "other"
    (bundle / "notes.txt").write_text("mine")
    assert cli(*make, "--force") == 2
    assert "is not as it was made (notes.txt is not listed)" in cli.out
    assert (bundle / "notes.txt").read_text() == "mine"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    assert cli("bundle", artifact.directory, "-o", mine, "--force") == 2
    assert "it is not a bundle and is not replaced" in cli.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "mine"]


def test_nothing_is_left_of_a_failure(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.bundle import make as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_put_sources", full)
    with pytest.raises(ArtifactError, match="cannot be written \\(No space left"):
        make_bundle(artifact, tmp_path / "bundle", BundleRequest())
    assert list(tmp_path.iterdir()) == []


def test_usage(cli: Run, artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    for arguments, message in [
        ((), "give either -o OUT"),
        (("-o", out, "--verify"), "give either -o OUT"),
        (("-o", out, "--batch=1,2"), "is not three sizes"),
        (("-o", out, "--batch=2,4,8"), "let MIN be 1"),
        (("-o", out, "--batch=1,8,4"), "must grow"),
        (("-o", out, "--instances=0"), "instances=0"),
        (("-o", out, "--name=a b"), "name='a b' is not a letter followed by"),
        (("-o", out, "--name=../x"), "name='../x' is not a letter followed by"),
    ]:
        assert cli("bundle", artifact.directory, *arguments) == 2
        assert message in cli.out
    assert cli("bundle", "--verify", artifact.directory) == 2
    assert "is not a bundle" in cli.out
    for option, shown in (
        ("--force", "force=True"),
        ("--name=x", "name=x"),
        ("--labels=x", "labels"),
        ("--batch=1,8,32", "batch=1,8,32"),
        ("--queue-us=0", "queue_us=0"),
        ("--instances=2", "instances=2"),
    ):
        assert cli("bundle", "--verify", artifact.directory, option) == 2
        assert shown in cli.out
        assert "with --verify, which makes no bundle" in cli.out
    assert list(tmp_path.iterdir()) == []


def test_labels(artifact: Artifact, bundle: Path, tmp_path: Path) -> None:
    label_file = f"triton/tensorrt/{NAME}/labels.txt"
    assert (bundle / label_file).read_text().splitlines()[:2] == ["class 0", "class 1"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefg"))
    make_bundle(artifact, tmp_path / "named", BundleRequest(labels=names))
    assert (tmp_path / "named" / label_file).read_text() == "a\nb\nc\nd\ne\nf\ng\n"
    names.write_text("one\ntwo")
    with pytest.raises(ValueError, match="names 2 classes"):
        make_bundle(artifact, tmp_path / "wrong", BundleRequest(labels=names))


def test_bfloat16_has_no_onnxruntime_variant(tmp_path: Path) -> None:
    out = exported(tmp_path, micro(None), dtype="bfloat16")
    manifest = make_bundle(out, tmp_path / "bundle", BundleRequest())
    assert "bfloat16" in manifest.absent["triton/onnxruntime"]
    assert not (tmp_path / "bundle/triton/onnxruntime").exists()
    report = verify_bundle(tmp_path / "bundle")
    assert report.passed
    assert "bfloat16" in report.not_run


@pytest.mark.parametrize("variant", ["tensorrt", "onnxruntime"])
def test_config_is_of_tritons_schema(made: Path, variant: str) -> None:
    from google.protobuf import text_format

    schema = triton_schema()
    text = (made / f"triton/{variant}/{NAME}/config.pbtxt").read_text()
    config = text_format.Parse(text, schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (NAME, variant, 4)
    inputs = [(t.name, t.data_type, list(t.dims)) for t in config.input]
    assert inputs == [("images", schema.TYPE_FP32, [3, 48, 48])]
    outputs = [(t.name, t.data_type, list(t.dims)) for t in config.output]
    assert outputs == [
        ("logits", schema.TYPE_FP32, [7]),
        ("kept_positions_0", schema.TYPE_INT64, [27]),
        ("kept_positions_1", schema.TYPE_INT64, [21]),
    ]
    assert config.output[0].label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    kind = schema.ModelInstanceGroup
    (group,) = config.instance_group
    assert group.count == 1
    assert group.kind == (kind.KIND_GPU if variant == "tensorrt" else kind.KIND_CPU)
    libraries = list(config.model_operations.op_library_filename)
    assert libraries == ([] if variant == "tensorrt" else ["/opt/vssm/lib/libvssm_onnxruntime.so"])
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text.replace("backend:", "back_end:"), schema.ModelConfig())


HOSTILE = 'a" }\nmodel_operations { op_library_filename: "/tmp/evil.so" }\n# \\ \x1b \u202e\''


def test_no_name_becomes_a_setting(artifact: Artifact) -> None:
    """Whatever a manifest says, each text stays one text of the configuration."""
    from google.protobuf import text_format

    schema = triton_schema()
    tensors = (TensorInfo("logits", "float32", ("batch", 7)), TensorInfo(HOSTILE, "int64", (1, 2)))
    manifest = dataclasses.replace(artifact.manifest, outputs=tensors)
    for write in (tensorrt_config, onnxruntime_config):
        text = write(HOSTILE, manifest, ServingOptions())
        config = text_format.Parse(text, schema.ModelConfig())
        assert config.name == HOSTILE
        assert [t.name for t in config.output] == ["logits", HOSTILE]
        assert "/tmp/evil.so" not in config.model_operations.op_library_filename
        assert "\x1b" not in text
        assert read_served_name(text) == HOSTILE


def test_a_hostile_export_is_refused(cli: Run, artifact: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact.directory, tmp_path / "hostile"))
    document = json.loads((folder / "model.json").read_text())
    document["outputs"][1]["name"] = HOSTILE
    (folder / "model.json").write_text(json.dumps(document))
    assert cli("bundle", folder, "-o", tmp_path / "bundle") == 2
    assert "outputs[1].name=" in cli.out
    assert "must be a name" in cli.out
    assert not (tmp_path / "bundle").exists()


def test_a_type_that_no_server_takes(artifact: Artifact) -> None:
    odd = dataclasses.replace(
        artifact.manifest, outputs=(TensorInfo("logits", "bfloat16", ("batch", 7)),)
    )
    for config in (tensorrt_config, onnxruntime_config):
        with pytest.raises(UnsupportedError, match="output logits is of type bfloat16"):
            config("a", odd, ServingOptions())


STAND_INS = {
    "nvidia-smi": 'echo "NVIDIA H100, 9.0"',
    "trtexec": 'for a; do case $a in --saveEngine=*) echo plan > "${a#*=}";; esac; done\n'
    'printf "%s\\n" trtexec "$@" >> "$LOG"',
    "tritonserver": 'printf "%s\\n" tritonserver "$@" >> "$LOG"',
}


@pytest.fixture
def serve(bundle: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs start.sh with stand-ins for what needs a GPU; gives its exit code and their calls."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    (bundle / "lib/libvssm_tensorrt.so").write_bytes(b"plugin")

    def run(*arguments: str, **environment: str) -> tuple[int, list[str]]:
        log.write_text("")
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        engines = str(tmp_path / "engines")
        env = {**os.environ, "PATH": path, "LOG": str(log), "ENGINES": engines, **environment}
        command = ["bash", str(bundle / "start.sh"), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return done.returncode, log.read_text().splitlines() + done.stderr.splitlines()

    return run


def test_start_builds_the_engine_once(
    serve: Callable[..., tuple[int, list[str]]], bundle: Path, tmp_path: Path
) -> None:
    status, calls = serve("--log-verbose=1")
    assert status == 0
    assert calls[0] == "trtexec"
    assert f"--onnx={bundle}/model/model.onnx" in calls
    assert {"--stronglyTyped", "--noTF32"} <= set(calls)
    assert f"--dynamicPlugins={bundle}/lib/libvssm_tensorrt.so" in calls
    sizes = [line for line in calls if "Shapes=" in line]
    assert sizes == [
        "--minShapes=images:1x3x48x48",
        "--optShapes=images:2x3x48x48",
        "--maxShapes=images:4x3x48x48",
    ]
    server = calls[calls.index("tritonserver") :]
    plugins = f"plugins={bundle}/lib/libvssm_tensorrt_autoload.so"
    assert server[1:] == [
        f"--model-repository={bundle}/triton/tensorrt",
        f"--backend-config=tensorrt,{plugins}",
        "--log-verbose=1",
    ]
    plan = bundle / f"triton/tensorrt/{NAME}/1/model.plan"
    assert plan.read_text() == "plan\n"
    assert [p.suffix for p in (tmp_path / "engines").iterdir()] == [".plan"]
    assert stat.S_IMODE(plan.stat().st_mode) & 0o444 == 0o444
    assert "trtexec" not in serve()[1]
    (bundle / "lib/libvssm_tensorrt.so").write_bytes(b"another plugin")
    assert "trtexec" in serve()[1]


@pytest.mark.parametrize("fault", ["exit 3", "true"], ids=["fails", "writes nothing"])
def test_start_leaves_no_half_of_an_engine(
    serve: Callable[..., tuple[int, list[str]]], bundle: Path, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "bin/trtexec").write_text(f"#!/usr/bin/env bash\n{fault}\n")
    status, calls = serve()
    assert status == (3 if fault == "exit 3" else 1)
    assert "tritonserver" not in calls
    assert list((tmp_path / "engines").iterdir()) == []
    assert not (bundle / f"triton/tensorrt/{NAME}/1/model.plan").exists()


def test_start_serves_onnxruntime_without_a_gpu(
    serve: Callable[..., tuple[int, list[str]]], bundle: Path
) -> None:
    status, calls = serve(VARIANT="onnxruntime")
    assert status == 0
    assert calls == ["tritonserver", f"--model-repository={bundle}/triton/onnxruntime"]
    status, calls = serve(VARIANT="openvino")
    assert status == 2
    assert "VARIANT=openvino is not tensorrt or onnxruntime" in calls[0]


def test_docker_copies_what_is_there(made: Path) -> None:
    text = (made / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    assert copied
    for name in " ".join(copied).split():
        assert (made / name).exists(), name


def test_the_client_prepares_as_the_package_does(made: Path, tmp_path: Path) -> None:
    prepare = runpy.run_path(str(made / "client.py"))["prepare"]
    spec = json.loads((made / "model/model.json").read_text())["preprocessing"]
    for size in ((80, 60), (33, 90), (48, 48), (54, 54)):
        path = tmp_path / "image.png"
        pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        want = vssm.preprocess(path, made / "model")[0]
        np.testing.assert_array_equal(prepare(str(path), spec), want)


def test_the_client_asks_a_server(made: Path, picture: Path) -> None:
    """A server of ours that speaks the protocol; the client is the bundle's, with NVIDIA's code."""
    with serving(lambda feeds: feeds) as server:
        lines = ask(made, server, picture, picture, "--top=2")
    assert server.seen == [(f"/v2/models/{NAME}/infer", {"images": [2, 3, 48, 48]})]
    assert lines == 2 * [str(picture), "     9.500  name 0", "     8.500  name 1"]


@pytest.mark.slow
def test_the_sources_build(made: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    configure = ["cmake", "-S", str(made / "sources"), "-B", str(build), "-G", "Ninja"]
    for command in ([*configure, "-DVSSM_CUDA=OFF"], ["cmake", "--build", str(build), "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = build.rglob(find_library().name)
    from vssm.runtimes.library import library_info

    assert library_info(library).operators == library_info().operators
