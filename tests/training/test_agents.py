"""Fine-tuning on two machines: two agents of torchrun on this one, which meet over its network."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import PYTHONPATH, ROOT
from finetune_cases import write_pictures

RESULTS = ("finetuned.safetensors", "finetuned_ema.safetensors", "log.csv")
# Or else PyTorch keeps the addresses of the first meeting, and who joins later waits for new ones.
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# A line for every step. It does not ask to go on: that is what a restart is for.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from finetune_cases import request
from pathlib import Path
import vssm

if __name__ == "__main__":
    data, output = map(Path, sys.argv[2:])
    each, numbers = {"save_every": 1}, {"batch": 12, "mixup": 0.0, "cutmix": 0.0, "epochs": 6}
    asked = request(data, output, resources=each, **numbers)
    vssm.finetune(asked, progress=lambda *step: step[3:] and print(*step, flush=True))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _agent(folder, data, output, *options):
    """An agent and its processes, whose working directory tells them from another's."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*launch, "train.py", str(ROOT / "tests/support"), str(data), str(output)],
        env={**os.environ, **NEW_STORE, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        **pipes,
    )


def _meeting(port):
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two"]
    return ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *rendezvous]


def _first(folder, data, output, port):
    """The agent that holds what the others meet at, once it does."""
    agent = _agent(folder, data, output, *_meeting(port))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return agent
        assert agent.poll() is None
        time.sleep(0.1)
    raise AssertionError("the first agent listens to nobody")


def _ended(*agents):
    for agent in agents:
        said, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, said


def _lose(agent, folder):
    """As when its machine is switched off."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                os.kill(int(entry.name), signal.SIGKILL)
    agent.communicate(timeout=60)


@pytest.mark.slow
def test_two_agents_end_as_one_whichever_is_lost(data, tmp_path):
    alone = tmp_path / "out_one"
    _ended(_agent(tmp_path / "one", data, alone, "--standalone", "--nproc-per-node=2"))

    port, output = _free_port(), tmp_path / "out_two"
    first = _first(tmp_path / "a", data, output, port)
    _ended(first, _agent(tmp_path / "b", data, output, *_meeting(port)))

    port, lost = _free_port(), tmp_path / "out_lost"
    first = _first(tmp_path / "c", data, lost, port)
    second = _agent(tmp_path / "d", data, lost, *_meeting(port))
    deadline = time.monotonic() + 240
    while not (lost / "state.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    _lose(second, tmp_path / "d")
    _ended(first, _agent(tmp_path / "e", data, lost, *_meeting(port)))

    for name in RESULTS:
        expected = (alone / name).read_bytes()
        assert (output / name).read_bytes() == expected, name
        assert (lost / name).read_bytes() == expected, name
    assert json.loads((lost / "finetune.json").read_text())["trained"]["resumed"] > 0
