"""The CUDA side of the ONNX Runtime adapter, without a GPU.

The adapter's own code runs, over the emulated CUDA kernels; a stand-in plays ONNX Runtime's host
side (tests/support/ort_host.py). What only a GPU can show is in tests/runtimes/test_ort_cuda.py.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from cases import (
    DTYPES,
    EXTRA,
    GATHERS,
    SCAN_SIZES,
    TOGETHER_SIZES,
    conv_case,
    gather_case,
    grid_case,
    scan_case,
    scan_reference_arguments,
    scatter_case,
)
from checkout import PYTHONPATH
from ort_host import Host, HostError
from tolerances import SCAN_TOLERANCE, relative_error

from vssm.native_library import find_library
from vssm.ops import reference
from vssm.ops.spec import OPERATORS, SCAN_OPERATORS

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
SHAPES = [*SCAN_SIZES[:6], *TOGETHER_SIZES[:3]]


@functools.cache
def _host(library) -> Host:
    return Host(find_library(library))


def _clean(library):
    """The host of a library; afterwards all that it lent must be back."""
    host = _host(library)
    host.lent.clear()
    host.out_of_memory = False
    yield host
    assert host.scratch == {}, "every workspace went back"
    assert host.allocators == 0, "every allocator was released"


@pytest.fixture
def host():
    yield from _clean("vssm_onnxruntime_emulated")


@pytest.fixture
def probe():
    """Launchers that write stream, workspace and its size into the first output."""
    yield from _clean("vssm_onnxruntime_probe")


def _run(host, name, case, **attributes):
    op = host.find(name, CUDA, {n: t.dtype for n, t in case.items()})
    kept = {n: t.contiguous() for n, t in case.items()}
    before = host.count("vssm_cuda_kernel_calls")
    outputs = host.run(op, kept, attributes)
    assert host.count("vssm_cuda_kernel_calls") == before + 1
    assert host.count("vssm_kernel_calls") == 0, "the CPU kernels stood still"
    return outputs


def test_every_operator_is_there_for_both_providers(host):
    per_provider = [
        (op.name, provider)
        for provider in (CPU, CUDA)
        for op in OPERATORS.values()
        for _ in op.types
    ]
    assert host.providers() == per_provider


def test_what_may_take_the_memory_of_an_input(host):
    named = zip(host.providers(), host.backend, strict=True)
    found = {name: host.in_place(op) for name, op in named}
    shared = {name: pairs for name, pairs in found.items() if pairs}
    assert shared == {("TokenScatter", CPU): [(0, 0)], ("TokenScatter", CUDA): [(0, 0)]}
    case = scatter_case(batch=2)
    (y,) = host.run(host.find("TokenScatter", CUDA), case, {})
    assert torch.equal(y, reference.token_scatter(case["base"], case["x"], case["position"]))


_OLD_HOSTS = """
import os, sys
from ort_host import Host, HostError
from vssm.native_library import find_library

def found(version):
    try:
        host = Host(find_library("vssm_onnxruntime_emulated"), version=version)
    except HostError as error:
        return str(error)
    shared = {pair for pair, op in zip(host.providers(), host.backend) if host.in_place(op)}
    providers = " ".join(sorted({provider for _, provider in host.providers()}))
    return f"{providers}, {len(shared)} may take an input's memory"

for version in map(int, sys.argv[1:]):
    if os.fork() == 0:
        print(found(version), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, version
"""


def test_older_hosts_get_what_they_can_serve():
    """Each in a process of its own: a library serves one host."""
    command = [sys.executable, "-c", _OLD_HOSTS, "18", "17", "16"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    assert subprocess.check_output(command, env=environment, text=True).splitlines() == [
        f"{CPU} {CUDA}, 2 may take an input's memory",
        f"{CPU}, 0 may take an input's memory",
        "vssm: needs ONNX Runtime 1.17 or newer",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan_matches_the_oracle(host, index, name, dtype):
    case = scan_case(**SHAPES[index], extra=EXTRA[name], dtype=dtype, seed=index)
    attributes = {"params_by_step": index % 2, "scale": 0.5 if index % 3 == 0 else 1.0}
    (y,) = _run(host, name, case, **attributes)
    want = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    assert y.dtype == dtype
    error = relative_error(y, want)
    assert error <= SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "dtypes"), GATHERS, ids=str)
def test_gather_is_the_oracle(host, name, dtypes):
    case = gather_case(seqlen=65, batch=3, widths=(17, 5)[: len(dtypes)], dtypes=dtypes, ties=True)
    xs = [case[f"x{i}"] for i in range(len(dtypes))]
    attributes = {"num_keep": 40, "protected_position": int(case["position"][1, 7])}
    kept, *rows = _run(host, name, case, **attributes)
    want, rows_wanted = reference.token_gather(case["score"], case["position"], xs, **attributes)
    assert torch.equal(kept, want)
    for row, row_wanted in zip(rows, rows_wanted, strict=True):
        assert torch.equal(row, row_wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_matches_the_oracle(host, dtype):
    case = conv_case(batch=2, d_inner=20, dtype=dtype)
    for attributes in ({}, {"by_position": 1, "activation": 0}):
        (y,) = _run(host, "TokenConv", case, **attributes)
        want = reference.token_conv(**scan_reference_arguments(case), **attributes)
        assert relative_error(y, want) <= SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_over_a_grid_matches_the_oracle(host, dtype):
    case, attributes = grid_case(batch=2, seqlen=30, d_inner=20, dtype=dtype)
    (y,) = _run(host, "TokenConv2D", case, **attributes)
    want = reference.token_conv2d(**scan_reference_arguments(case), **attributes)
    assert relative_error(y, want) <= SCAN_TOLERANCE[dtype]


def test_defaults_of_attributes_are_the_tables(host):
    case = scan_case(seqlen=9)
    (y,) = _run(host, "SelectiveScan", case)
    (same,) = _run(host, "SelectiveScan", case, delta_softplus=1, params_by_step=0, scale=1.0)
    assert torch.equal(y, same)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("TokenGather", {}, "attribute num_keep is missing"),
        ("TokenGather", {"num_keep": 0}, "num_keep=0 is outside"),
        ("TokenGather", {"num_keep": 2.0}, "attribute num_keep is not an int"),
        ("SelectiveScan", {"scale": 1}, "attribute scale is not a float"),
        ("GatedSelectiveScan", {"params_by_step": 1.0}, "params_by_step is not an int"),
    ],
)
def test_bad_attributes_make_no_kernel(host, name, attributes, message):
    with pytest.raises(HostError, match=message):
        host.create(host.find(name, CUDA), attributes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("A", lambda t: t[:, :-1], r"d_inner\(A\)=15, but the other inputs have 16"),
        ("delta", lambda t: t[:, :-1], r"seqlen\(delta\)=8, but the other inputs have 9"),
        ("gap", lambda t: t.float(), r"gap.*float32"),
        ("order", lambda t: t[..., :0], r"seqlen\(order\)=0"),
    ],
)
def test_bad_operands_are_refused_before_anything_is_lent(host, name, change, message):
    case = scan_case(seqlen=9)
    op = host.find("SelectiveScan", CUDA, {n: t.dtype for n, t in case.items()})
    case[name] = change(case[name]).contiguous()
    with pytest.raises(HostError, match=message):
        host.run(op, case, {})
    assert host.lent == []


def test_an_order_that_is_none_touches_no_other_memory(host):
    """The CUDA kernels cannot look at values; guards are for test_cuda_*.py, the call for here."""
    case = scan_case(seqlen=9)
    case["order"] = torch.full_like(case["order"], 1 << 30)
    (y,) = _run(host, "SelectiveScan", case)
    assert y.shape == (1, 9, 16)


@pytest.mark.parametrize("op", SCAN_OPERATORS, ids=lambda op: op.name)
def test_an_empty_batch(host, op):
    case = scan_case(seqlen=5, extra=EXTRA[op.name])
    batched = {o.name for o in op.inputs if o.shape[0] == "batch"}
    (y,) = _run(host, op.name, {n: t[:0] if n in batched else t for n, t in case.items()})
    assert y.shape == (0, 5, 16)


def _told(output):
    stream, workspace, size = output.view(-1)[:6].view(torch.int64).tolist()
    return stream, workspace, size


def test_a_launch_gets_the_stream_and_the_workspace_of_the_provider(probe):
    (y,) = _run(probe, "SelectiveScan", scan_case(seqlen=9))
    stream, workspace, size = _told(y)
    assert stream == probe.stream
    assert workspace % 256 == 0
    assert probe.lent == [4000] == [size]


def test_no_workspace_is_asked_for_where_none_is_needed(probe):
    _, y0, _ = _run(probe, "TokenGather", gather_case(seqlen=9), num_keep=4)
    assert _told(y0) == (probe.stream, 0, 0)
    assert probe.lent == []


def test_the_workspace_goes_back_when_a_launch_fails(probe):
    with pytest.raises(HostError, match="SelectiveScan: the launch failed, as the test asked"):
        _run(probe, "SelectiveScan", scan_case(seqlen=9), scale=-1.0)
    assert probe.lent == [4000]


def test_a_full_device_is_an_error(probe):
    probe.out_of_memory = True
    with pytest.raises(HostError, match="onnxruntime GetScratchBuffer: arena is full"):
        _run(probe, "SelectiveScan", scan_case(seqlen=9))
