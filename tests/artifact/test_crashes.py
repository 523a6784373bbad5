"""An export, an engine and a bundle, killed before every change that they make to files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import PYTHONPATH

_SCRIPT = """
import importlib, shutil, sys
from pathlib import Path
import torch
from crashes import crashes, forked
from exports import micro
from vssm.artifact.directory import open_artifact
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.manifest import compare_files, read_bundle_manifest
from vssm.files.staging import settle
from vssm.runtimes.tensorrt import build as engines
from vssm.runtimes.tensorrt.engine import read_info
import vssm

torch.set_num_threads(1)
case, folder = sys.argv[1], Path(sys.argv[2])
out, saved = folder / "out", folder.with_name("saved")
model = micro()
module = importlib.import_module("vssm.onnx.export")
traced = {name: module.build_proto(model, dtype=name, opset=18) for name in ("float32", "float16")}
module.build_proto = lambda _, dtype, opset, **__: type(traced[dtype]).FromString(
    traced[dtype].SerializeToString()
)
engines.build_plan = lambda *_, **__: engines.SerializedEngine(PLAN, 1)
RTX = engines.EngineRequest(runtime="tensorrt-rtx")
PLAN = b"old"


def export(dtype):
    vssm.export(model, out, dtype=dtype, force=True)


def engine(plan):
    global PLAN
    PLAN = plan
    engines.build_engine(open_artifact(out), RTX)


def bundle(name):
    make_bundle(open_artifact(folder.with_name("made")), out, BundleRequest(name=name, force=True))


def state():
    if case == "bundle":
        settle(out)
        manifest = read_bundle_manifest(out)
        assert not compare_files(out, manifest)
        return manifest.name
    artifact = open_artifact(out)
    if case == "export":
        return artifact.manifest.dtype
    plan = (out / "model.rtx.plan").read_bytes()
    info = read_info(out / "engine.rtx.json", "")
    assert info.plan_bytes == len(plan)
    return plan


work, old, new = {
    "export": (export, "float32", "float16"),
    "engine": (engine, b"old", b"new, longer"),
    "bundle": (bundle, "old", "new"),
}[case]
if case == "bundle":
    vssm.export(model, folder.with_name("made"))
if case == "engine":
    export("float32")
work(old)
shutil.copytree(out, saved)


def prepare():
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copytree(saved, out)


seen = []
for crash in crashes(lambda: work(new), prepare, 29 if case == "bundle" else 3):
    seen.append(state())
    assert seen[-1] in (old, new), (crash, seen[-1])
    assert forked(lambda: work(new)) == 0, crash
    assert state() == new, crash
    assert [p.name for p in folder.iterdir()] == ["out"], crash
    assert not [p.name for p in out.iterdir() if ".vssm-" in p.name], crash
assert {old, new} <= set(seen)
print(len(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["export", "engine", "bundle"])
def test_a_crash_at_every_change_of_a_file(tmp_path: Path, case: str) -> None:
    """The old or the new one is whole, and the next run leaves nothing of the killed one."""
    if case == "engine" and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed, which names the engine's version")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", _SCRIPT, case, str(tmp_path / "work")]
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= 5
