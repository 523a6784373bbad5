"""Scans of long lists on a CPU, whose channels go through the tokens part by part."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import scan_case, scan_reference_arguments
from native import isa_parameters, run_operator
from tolerances import SCAN_TOLERANCE

from vssm.ops import reference

ISAS = isa_parameters()
# A list is long from 2.5 million elements of u, delta and y in an image on; a block of 16 channels
# alone has a twelfth of these. Neither the tokens nor the channels come out even.
SIZES = {"seqlen": 2503, "d_inner": 200, "directions": 2}
CASES = [
    ("SelectiveScan", {"d_state": 16, "gap": "ones"}),
    ("SelectiveScanConstantGap", {"d_state": 8, "extra": "delta0", "dtype": torch.bfloat16}),
    ("GatedSelectiveScan", {"d_state": 1, "extra": "z", "dtype": torch.float16}),
    ("GatedSelectiveScan", {"d_state": 5, "extra": "z", "batch": 2, "per_image": True}),
    ("SelectiveScan", {"d_state": 9, "decay": "head", "batch": 2}),
]


@functools.cache
def _case(index):
    return scan_case(**SIZES, **CASES[index][1])


def _channels(case, channels):
    last = {
        n: case[n][..., channels]
        for n in ("u", "delta", "D", "delta_bias", "z", "delta0")
        if n in case
    }
    return case | last | {"A": case["A"][:, channels]}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_block_of_channels_is_as_alone_on_any_number_of_threads(index, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    name, case = CASES[index][0], _case(index)
    found = run_operator(name, case)["y"]
    for threads in (2, 5, 16):  # of 13 blocks
        assert torch.equal(run_operator(name, case, threads=threads)["y"], found)
    for start in (0, 112, 192):
        channels = slice(start, start + 16)
        alone = run_operator(name, _channels(case, channels))["y"]
        assert torch.equal(found[..., channels], alone)


@functools.cache
def _with_oracle():
    case = scan_case(seqlen=2003, d_inner=430, d_state=2, directions=1, order="ends")
    return case, reference.selective_scan(**scan_reference_arguments(case))


@pytest.mark.parametrize("isa", ISAS)
def test_a_long_scan_matches_the_oracle(isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case, expected = _with_oracle()
    error = (run_operator("SelectiveScan", case)["y"].double() - expected).abs().max()
    assert error <= SCAN_TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_one_block_of_channels_leaves_other_threads_nothing_to_do(isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=32_000, d_inner=16, d_state=2, directions=4, order="ends")
    first = run_operator("SelectiveScan", case)["y"]
    assert torch.equal(run_operator("SelectiveScan", case, threads=3)["y"], first)
