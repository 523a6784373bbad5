"""Help, the list of models and a wrong option come at once: torch is not imported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Seconds of CPU, about four times what a machine at rest takes: a guard against torch (1.5 s and
# more) and against building models (17 s), not a measurement. benchmarks/startup.py measures.
GENEROUS = 2.0
QUICK = [
    (["--help"], 0),
    (["-h"], 0),
    (["export", "-h"], 0),
    (["models"], 0),
    (["models", "--json", "-"], 0),
    (["export", "vim_tiny", "--set", "imagesize=3", "-o", "out"], 2),
    (["export", "vim_tinny", "-o", "out"], 2),
    (["export", "vim_tiny", "--dtype", "int8", "-o", "out"], 2),
    (["export", "vim_tiny", "--opset", "3", "-o", "out"], 2),
    (["export", "vim_tiny", "--schedule", "5:2", "-o", "out"], 2),
    (["export", "--nonsense"], 2),
    (["finetune", "vim_tinny", "--data", ".", "-o", "out"], 2),
]


@pytest.mark.parametrize(("arguments", "code"), QUICK, ids=lambda v: str(v)[:60])
def test_an_answer_comes_without_torch(arguments: list[str], code: int) -> None:
    program = (
        "import sys\n"
        "from vssm.commands.main import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    after = os.times()
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert seconds < GENEROUS


def test_json_on_standard_output_is_json_alone() -> None:
    command = [sys.executable, "-m", "vssm.commands.main", "models", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["name"] == "vim_tiny"
    assert "GFLOPs" in done.stderr
