"""Upstream's unmodified Vim-T beside this package's own, in ONNX Runtime on this CPU.

    VSSM_UPSTREAM=/path/to/clones python benchmarks/upstream_vim.py [--samples 41]

Runs alternate, one image and one thread, so that the ratio holds although the machine is noisy.
The clone is VSSM_UPSTREAM/Vim; its fork's mixer (mamba-1p1p1) is used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch

import vssm
from vssm.compat.factory import build_from, search_path

FACTORY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def main() -> None:
    """Export both, time both, print the ratio of the medians and of the minima."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=41)
    samples = parser.parse_args().samples
    root = Path(os.environ["VSSM_UPSTREAM"]) / "Vim"
    target = f"{root / 'vim' / 'models_mamba.py'}:{FACTORY}"
    with search_path(target, (root / "mamba-1p1p1",)), vssm.compat.upstream():
        theirs = build_from(target, {})
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        module = vssm.export_module(theirs, torch.zeros(1, 3, 224, 224), Path(folder) / "theirs")
        print(f"export of upstream's module: {time.perf_counter() - start:.1f} s")
        own = vssm.export(vssm.create_model("vim_tiny"), Path(folder) / "ours")
        nodes = [len(onnx.load(str(a.model_path)).graph.node) for a in (own, module)]
        print(f"nodes: ours {nodes[0]}, upstream's {nodes[1]}, ratio {nodes[1] / nodes[0]:.3f}")
        times = _times(own, module, samples)
    for name, of in (("median", statistics.median), ("minimum", min)):
        ours, upstream = (1e3 * of(t) for t in times)
        print(f"{name} ms: ours {ours:.2f}, upstream's {upstream:.2f}, ratio {upstream / ours:.3f}")


def _times(first: object, second: object, samples: int) -> list[list[float]]:
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    times: list[list[float]] = [[], []]
    with (
        vssm.open_session(first, threads=1) as a,
        vssm.open_session(second, threads=1) as b,
    ):
        for turn in range(samples + 2):
            for session, kept in zip((a, b), times, strict=True):
                start = time.perf_counter()
                session.run(images)
                if turn >= 2:  # two to warm up
                    kept.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
