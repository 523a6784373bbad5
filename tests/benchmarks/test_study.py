"""The study's statistics by hand, and a whole run on a few pictures."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from benchmarks import study
from checkout import PYTHONPATH, ROOT
from PIL import Image


def _row(key, tuned, top1s):
    return {
        "variants": [key],
        "label": f"the label of {key}" + (", fine-tuned" if tuned else ""),
        "tuned": tuned,
        "top1s": top1s,
        "flops": {"published": 5e6, "unaligned": 4e6, "true": 7e6},
    }


def test_tables_by_hand():
    rows = [
        _row("none", False, [0.5, 0.6, 0.7]),
        _row("gap", False, [0.51, 0.62, 0.74]),
        _row("gap", False, [0.51, 0.62, 0.74]),  # stands in several tables of an ablation
        _row("none", True, [0.8, 0.8, 0.9]),
        {**_row("random-0", False, [0.1] * 6), "variants": ["random-0", "random-1"]},
    ]
    runs = study._runs({"rows": rows})
    assert [(run["tuned"], run["key"]) for run in runs] == [
        (False, "none"),
        (False, "gap"),
        (True, "none"),
    ]
    # 1, 2 and 4 points: mean 7/3, standard error 0.8819; t is 4.3027 at 2 degrees of freedom.
    line = "| the label of gap | 5.00 | 7.00 | 62.33 ± 11.50 | +2.33 ± 0.88 (-1.46 to +6.13) |"
    assert line in study._markdown(runs)
    assert "| the label of none | 5.00 | 7.00 | 83.33 ± 5.77 | - |" in study._markdown(runs)
    assert study._csv(runs).splitlines()[:2] == [
        "weights,variant,seed,top1",
        "zero-shot,none,0,50.0000",
    ]


def test_an_interval_without_zero_is_bold():
    assert study.difference([1.0, 2.0, 3.0], [0.0, 1.0, 1.9]) == (
        "**+1.03** ± 0.03 (+0.89 to +1.18)"
    )
    assert study.difference(None, [1.0]) == "-"


@pytest.mark.slow
def test_whole(tmp_path):
    generator = np.random.default_rng(0)
    for part in ("train", "held_out"):
        for label in range(10):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 255, (36, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    small = ["--seeds=2", "--batch=10", "--epochs=1", "--further=1", "--finetune=none,merge"]
    call = [sys.executable, "benchmarks/study.py", tmp_path, "-o", tmp_path / "out", *small]
    for _ in range(2):  # the second time everything is there
        subprocess.run(call, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    lines = (tmp_path / "out" / "study.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * (14 + 2)
