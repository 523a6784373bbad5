"""CUDA launches on a GPU: graphs, streams, other devices; their values are tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import gather_case, scan_case
from checkout import PYTHONPATH
from cuda_device import CUDA, VARIANTS, prepare, run_operator

pytestmark = pytest.mark.gpu
_SCAN = {"seqlen": 197, "d_inner": 96, "d_state": 16, "batch": 4}
_GATHER = {"seqlen": 197, "batch": 4, "widths": (96, 48)}
LAUNCHES = [
    *(("SelectiveScan", {"variant": variant}) for variant in VARIANTS.values()),
    *(("GatedSelectiveScan", {"variant": variant}) for variant in VARIANTS.values()),
    ("TokenGather", {"num_keep": 157, "protected_position": 3}),
]
each_launch = pytest.mark.parametrize(("name", "attributes"), LAUNCHES, ids=str)


def make_case(name, seed=0):
    if name == "TokenGather":
        return gather_case(**_GATHER, dtypes=(torch.float16, torch.float32), seed=seed)
    extra = "z" if name == "GatedSelectiveScan" else ""
    return scan_case(**_SCAN, extra=extra, dtype=torch.float16, seed=seed)


def assert_same(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def current_stream():
    return torch.cuda.current_stream().cuda_stream


@each_launch
def test_graph_replays_what_it_captured(name, attributes):
    first, second = make_case(name), make_case(name, seed=1)
    call = prepare(CUDA, name, first, **attributes)
    call.enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.enqueue(current_stream())
    for case in (first, second):
        for n, memory in call.inputs.items():
            memory.tensor.copy_(case[n])
            call.copies[n] = case[n].clone()
        for memory in call.outputs.values():
            memory.tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()
        assert_same(call.results(), run_operator(CUDA, name, case, **attributes))


FIRST = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_launch import CUDA, LAUNCHES, assert_same, current_stream, make_case, prepare
name, attributes = LAUNCHES[int(sys.argv[2])]
call = prepare(CUDA, name, make_case(name), **attributes)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call.enqueue(current_stream())
graph.replay()
captured = call.results()
call.enqueue()
assert_same(captured, call.results())
"""


@pytest.mark.parametrize("index", range(len(LAUNCHES)))
def test_first_launch_of_a_process_may_be_in_a_graph(index):
    """It loads the library's modules and the kernel, which a capture forbids to other callers."""
    command = [sys.executable, "-c", FIRST, str(Path(__file__).parent), str(index)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("variant", ["throughput", "latency"])
def test_threads_that_need_different_amounts_of_shared_memory(variant):
    """Each asks for what its kernel may take, and leaves the others theirs."""
    cases = [
        scan_case(seqlen=n, d_inner=96, directions=4, shared="udACD", seed=n) for n in (150, 197)
    ]
    attributes = {"variant": VARIANTS[variant], "params_by_step": 1}
    expected = [run_operator(CUDA, "SelectiveScan", case, **attributes) for case in cases]

    def launches(index):
        call = prepare(CUDA, "SelectiveScan", cases[index], **attributes)
        for _ in range(2000):
            call.enqueue()
        return call.results()

    with ThreadPoolExecutor(len(cases)) as threads:
        for got, wanted in zip(threads.map(launches, range(len(cases))), expected, strict=True):
            assert_same(got, wanted)


@each_launch
def test_two_streams_at_once(name, attributes):
    cases = [make_case(name, seed) for seed in range(6)]
    calls = [prepare(CUDA, name, case, **attributes) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        for i, call in enumerate(calls):
            call.enqueue(streams[i % 2].cuda_stream)
    for case, call in zip(cases, calls, strict=True):
        assert_same(call.results(), run_operator(CUDA, name, case, **attributes))


@each_launch
def test_launch_runs_on_the_stream_that_is_given(name, attributes):
    """Work that the stream does before is seen: the input comes late, and on that stream."""
    case = make_case(name)
    call = prepare(CUDA, name, case, **attributes)
    memory = next(iter(call.inputs.values()))
    late = memory.tensor.clone()
    memory.tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        memory.tensor.copy_(late)
        call.enqueue(stream.cuda_stream)
    assert_same(call.results(), run_operator(CUDA, name, case, **attributes))


@each_launch
def test_launch_on_another_device(name, attributes):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    case = make_case(name)
    call = prepare(CUDA, name, case, device="cuda:1", **attributes)
    with torch.cuda.device(1):
        call.enqueue(current_stream())
    assert_same(call.results(), run_operator(CUDA, name, case, **attributes))


@each_launch
def test_launches_allocate_nothing(name, attributes):
    call = prepare(CUDA, name, make_case(name), **attributes)
    call.enqueue()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(50):
        call.enqueue()
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert after == before


@each_launch
def test_results_are_the_same_every_time(name, attributes):
    case = make_case(name)
    expected = run_operator(CUDA, name, case, **attributes)
    for _ in range(10):
        assert_same(run_operator(CUDA, name, case, **attributes), expected)
