"""Engines of full TensorRT with our plugins, on a GPU: built, proved and run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkout import PYTHONPATH
from exports import exported, images, micro
from tensorrt_build import ROOT

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library
from vssm.runtimes.library import TENSORRT_LIBRARY
from vssm.runtimes.tensorrt.build import EngineRequest, build_engine
from vssm.runtimes.tensorrt.session import TensorRtSession

BATCHES = EngineRequest(batch=(1, 3, 5))
SCHEDULE = ("--schedule", "5:0.8,10:0.8,15:0.8")
FAMILIES = ("vim_tiny", "vim_small", "plain_mamba_l1", "vmamba_tiny_s1l8", "groupmamba_tiny")
PRUNES = {"vim_tiny", "vim_small", "plain_mamba_l1"}
EXPORTS = [
    pytest.param(name, dtype, pruned, id=f"{name} {dtype} {'pruned' if pruned else 'dense'}")
    for name in FAMILIES
    for dtype in ("float32", "float16", "bfloat16")
    for pruned in ((False, True) if name in PRUNES else (False,))
]


def _missing() -> str:
    for module, command in (("tensorrt", "tensorrt"), ("cuda", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            return f"not installed: pip install {command}"
    try:
        find_library(TENSORRT_LIBRARY)
    except RuntimeUnavailableError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_missing()), reason=_missing())]


def _vssm(*arguments: object) -> None:
    """The command in a process of its own, which must succeed: `check` fails when parity does."""
    code = "import sys; from vssm.commands.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"vssm {arguments}: {done.returncode}\n{done.stdout}{done.stderr}")


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = exported(tmp_path_factory.mktemp("engine"), micro(), dtype=request.param)
    build_engine(made, BATCHES)
    return made


def test_parity(artifact: Artifact) -> None:
    report = vssm.check_parity(None, artifact, runtime="tensorrt", per_block=True)
    assert report.passed, report.failures
    assert report.info.backend == "kernel"


def test_graphs_change_nothing(artifact: Artifact) -> None:
    with TensorRtSession(artifact) as graph, TensorRtSession(artifact, graphs=False) as plain:
        for batch in (1, 5, 3, 1, 5):
            x = images(micro(), batch, seed=batch)
            for _ in range(2):
                got, want = graph.run(x), plain.run(x)
                for name, value in want.items():
                    np.testing.assert_array_equal(got[name], value)


def test_a_batch_is_its_images(artifact: Artifact) -> None:
    """Rows of a batch are those of the images alone, but for sums in another order."""
    x = images(micro(), 5)
    with TensorRtSession(artifact) as session:
        together = session.run(x)["logits"]
        alone = np.concatenate([session.run(x[i : i + 1])["logits"] for i in range(5)])
    scale = float(np.abs(together).max())
    limit = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}[artifact.manifest.dtype]
    np.testing.assert_allclose(alone, together, rtol=0, atol=limit * scale)


def test_plugins_inside_the_engine(tmp_path: Path) -> None:
    """Built by the command and run in a fresh process, which never loads the library itself."""
    out = exported(tmp_path, micro())
    _vssm("engine", out.directory, "--batch", "1,1,2", "--serialize-plugins")
    code = (
        "import json, sys\nimport numpy as np\nimport vssm\n"
        "with vssm.open_session(sys.argv[1], runtime='tensorrt') as session:\n"
        "    y = session.run(np.zeros((1, 3, 48, 48), np.float32))['logits']\n"
        "sys.stdout.write(json.dumps(y.tolist()))"
    )
    shown = subprocess.check_output([sys.executable, "-c", code, str(out.directory)], text=True)
    with vssm.open_session(out) as session:
        want = session.run(np.zeros((1, 3, 48, 48), np.float32))["logits"]
    got = np.array(json.loads(shown))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "pruned"), EXPORTS)
def test_engine_agrees_with_pytorch(name: str, dtype: str, pruned: bool, tmp_path: Path) -> None:
    """Any batch of the profile; the session replays a CUDA graph for each."""
    out = tmp_path / "out"
    _vssm("export", name, *(SCHEDULE if pruned else ()), "--dtype", dtype, "-o", out)
    _vssm("engine", out, "--batch", "1,4,8")
    _vssm("check", out, "--runtime", "tensorrt")
