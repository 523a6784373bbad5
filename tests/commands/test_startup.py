"""Help, the list of models and a wrong option come at once: torch is not imported for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

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


# Each command in a process of its own, forked from one that has imported what all of them do. It
# ends where it would import what takes seconds; what it has said by then is its first sign.
_FIRST_SIGN = """
import json
import os
import sys
from vssm.commands.main import main

HEAVY = {"torch", "onnx", "onnxruntime"}


class Heavy:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in HEAVY:
            sys.stdout.flush()
            os._exit(100)


assert not HEAVY & set(sys.modules)
sys.meta_path.insert(0, Heavy())
for arguments in json.load(sys.stdin):
    print(f"$ {arguments[0]}", flush=True)
    if os.fork() == 0:
        sys.argv = ["vssm", *arguments]
        os.dup2(1, 2)
        try:
            main()
        finally:
            os._exit(101)
    _, status = os.wait()
    print(f"-> {os.waitstatus_to_exitcode(status)}", flush=True)
"""


def test_every_long_command_says_something_before_it_imports_what_takes_seconds(
    tmp_path: Path,
) -> None:
    from exports import exported, micro

    export, other = (exported(tmp_path / name, micro()).directory for name in ("a", "b"))
    (tmp_path / "model.py").touch()
    images = tmp_path / "images"
    for number in range(7):
        (images / f"n{number}").mkdir(parents=True)
        (images / f"n{number}" / "a.png").touch()
    new = str(tmp_path / "new")
    commands = [
        ["export", "vim_tiny", "-o", new],
        ["export-module", str(tmp_path / "model.py:build"), "-o", new],
        ["quantize", str(export), "--weights-only", "-o", new],
        ["check", str(export)],
        ["run", str(export), "x.png"],
        ["bench", str(export)],
        ["evaluate", str(export), str(images)],
        ["predict", str(export), str(images), "-o", f"{new}.parquet"],
        ["finetune", "vim_tiny", "--data", str(images), "-o", new],
        ["ablate", "vim_tiny", str(images), "-o", new, "--schedule", "5:0.8"],
        ["compare", str(export), str(other), "-o", new, "--images", str(images)],
        ["visualize", "vim_tiny", "x.png", "-o", new, "--schedule", "5:0.8"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_SIGN],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    told = re.findall(r"^\$ (\S+)\n(.*?)-> (\d+)$", done.stdout, re.MULTILINE | re.DOTALL)
    assert [name for name, *_ in told] == [command[0] for command in commands]
    for name, said, code in told:
        assert code == "100", (name, said)
        assert said.startswith(("opening ", "loading PyTorch\n", "no checkpoint given")), name


def test_json_on_standard_output_is_json_alone() -> None:
    command = [sys.executable, "-m", "vssm.commands.main", "models", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["name"] == "vim_tiny"
    assert "GFLOPs" in done.stderr
