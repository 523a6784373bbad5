"""Runs an installed vssm as its user would: `installed.py EXPORT BUNDLE IMAGE`.

It needs what `pip install vssm` brings, and must not find a checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import vssm
from vssm.native_library import find_library
from vssm.runtimes.library import exp2_rate, find_sources, library_info


def check_place() -> None:
    """Package, libraries and sources are those of this environment."""
    package = Path(vssm.__file__).parent
    assert package.is_relative_to(sys.prefix), package
    for name in ("vssm", "vssm_onnxruntime"):
        assert find_library(name).parent == package / "lib"
    assert library_info().version == vssm.__version__
    assert find_sources() == package / "sources"
    assert exp2_rate(seconds=0.0) > 0


def check_sessions(export: str, image: str) -> None:
    """Kernels and bodies agree on an image file."""
    images = vssm.preprocess(image, export)
    logits = []
    for backend in ("kernel", "body"):
        with vssm.open_session(export, backend=backend, threads=1) as session:
            assert session.info.backend == backend
            logits.append(session.run(images)["logits"])
    difference = abs(logits[0] - logits[1]).max()
    assert difference <= 1e-4 * abs(logits[1]).max(), difference


def check_command(*arguments: str) -> None:
    """The command `vssm` ends with exit code 0 and says nothing on its error stream."""
    command = [str(Path(sys.executable).with_name("vssm")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), (arguments, done.stderr)


def main() -> None:
    """Check everything; an assertion says what fails."""
    export, bundle, image = sys.argv[1:]
    check_place()
    check_sessions(export, image)
    check_command("--help")
    check_command("run", export, image, "--threads=1")
    check_command("bundle", "--verify", bundle)
    check_command("doctor", "--json=doctor.json")
    report = json.loads(Path("doctor.json").read_text())
    assert {"vssm", "onnxruntime"} <= {finding["part"] for finding in report if finding["found"]}


if __name__ == "__main__":
    main()
