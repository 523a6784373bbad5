"""The emulated kernels under AddressSanitizer and UBSan, with guards that may not even be read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
TESTS = sorted(path.name for path in (ROOT / "tests/plugins/cuda").glob("test_[gs]*.py"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """With the sanitizers in front of everything, and the library that was built with them."""
    build = tmp_path_factory.mktemp("sanitized")
    settings = ["-DVSSM_CUDA=OFF", "-DVSSM_EMULATION=ON"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    for command in (
        [*configure, *settings, "-DCMAKE_CXX_FLAGS_RELEASE=-O1"],
        ["cmake", "--build", str(build), "--target", "vssm_emulated"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (library,) = build.glob("**/libvssm_emulated.so")
    compiler = (os.environ.get("CXX") or shutil.which("c++") or "g++").split()
    question = [*compiler, "-print-file-name=libasan.so"]
    asan = subprocess.check_output(question, text=True).strip()
    return {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:allow_user_poisoning=1",
        "VSSM_EMULATED_LIBRARY": str(library),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in TESTS if name != Path(__file__).name])
def test_emulated_kernels_are_clean(environment, name):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "emulated", f"tests/plugins/cuda/{name}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_read_outside_is_seen(environment):
    code = """
import sys; sys.path.insert(0, "tests/support")
import cuda_device, cases
call = cuda_device.prepare(cuda_device.EMULATED, "TokenGather1",
                           cases.gather_case(widths=(16,)), num_keep=64)
memory = call.inputs["x0"]
memory.stop -= 64
call.copies.clear()
call.enqueue()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
