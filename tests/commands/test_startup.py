"""Help, the list of models and a wrong option come at once: torch is not imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

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


# One after another in one process: what the first one brings in, the others are answered without.
PROGRAM = """
import json
import sys
import time
from vssm.commands.main import main

found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["vssm", *arguments]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    heavy = {"torch", "onnx", "onnxruntime", "numpy"} & set(sys.modules)
    found.append((code, sorted(heavy), time.process_time()))
print(json.dumps(found), file=sys.stderr)
"""


def test_an_answer_comes_without_torch() -> None:
    asked = json.dumps([arguments for arguments, _ in QUICK])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True
    )
    answers = json.loads(done.stderr.splitlines()[-1])
    before = 0.0  # the first answer's time has the start of the process in it
    for (arguments, code), (got, heavy, seconds) in zip(QUICK, answers, strict=True):
        assert (got, heavy) == (code, []), arguments
        assert seconds - before < GENEROUS, arguments
        before = seconds


def test_json_on_standard_output_is_json_alone() -> None:
    command = [sys.executable, "-m", "vssm.commands.main", "models", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["name"] == "vim_tiny"
    assert "GFLOPs" in done.stderr
