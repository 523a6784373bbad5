"""One Mamba layer of the package `mambapy`, exported by torch.onnx and by `export_module`.

    pip install mambapy
    python benchmarks/one_layer.py [--width 192] [--tokens 197] [--samples 60]

Its scan is a loop over the tokens, which torch.onnx unrolls into thousands of plain operators. Both
files run in ONNX Runtime on one thread and their outputs are compared. They run in turns, twice
each: the first time finds the caches as the other left them ("cold"), the second its own in them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import vssm
from vssm.compat import upstream
from vssm.runtimes.library import find_library
from vssm.runtimes.ort import cpu_name


def layer(width: int) -> nn.Module:
    """The mixer of mambapy, as it is imported now."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mambapy"]:
        del sys.modules[name]
    from mambapy.mamba import MambaBlock, MambaConfig

    torch.manual_seed(0)
    return MambaBlock(MambaConfig(d_model=width, n_layers=1, pscan=False)).eval()


def main() -> None:
    """Export both, run them in turns, and print their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--samples", type=int, default=60)
    options = parser.parse_args()
    x = torch.randn(1, options.tokens, options.width, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            "kernels": open_session(ours(options.width, x, Path(folder))),
            "loop": open_session(unrolled(options.width, x, Path(folder))),
        }
        times: dict[str, list[float]] = {name: [] for name in sessions}
        y = {}
        for _ in range(options.samples + 1):
            for name, session in sessions.items():
                for _ in range(2):
                    start = time.perf_counter()
                    y[name] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
                    times[name].append(1e3 * (time.perf_counter() - start))
    error = np.abs(y["kernels"] - y["loop"]).max() / np.abs(y["loop"]).max()
    print(f"{cpu_name()}, onnxruntime {onnxruntime.__version__}, 1 thread, {error:.1e} apart")
    cold, warm = ({n: taken[i::2][1:] for n, taken in times.items()} for i in (0, 1))
    for what, taken in (("warm", warm), ("cold", cold)):
        kernels, loop = (np.median(taken[name]) for name in ("kernels", "loop"))
        best = min(taken["loop"]) / min(taken["kernels"])
        print(
            f"{what}: kernels {kernels:.3f} ms, loop {loop:.3f} ms, ratio {loop / kernels:.2f}",
            end="",
        )
        print(f" ({best:.2f} of the shortest)")


def ours(width: int, x: Tensor, folder: Path) -> Path:
    """The file of `export_module`, whose scan is a node."""
    with upstream():
        model = layer(width)
    return vssm.export_module(model, x, folder / "ours").model_path


def unrolled(width: int, x: Tensor, folder: Path) -> Path:
    """The file of torch.onnx, whose scan is unrolled."""
    path = folder / "loop.onnx"
    torch.onnx.export(layer(width), (x,), path, external_data=False, verbose=False)
    return path


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on one thread, with our kernels for who needs them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(find_library()))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
