"""The C ABI: the CPU kernels through it, what it refuses, and the header from C."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import cuda_device
import pytest
import torch
from cases import EXTRA, gather_case, scan_case, scan_reference_arguments
from checkout import ROOT
from cuda_device import (
    DTYPE_CODES,
    EMULATED,
    HOST,
    CGatherAttributes,
    CLaunch,
    CScanAttributes,
    CTensor,
    OperatorError,
    describe,
    prepare,
    run_operator,
)
from tolerances import SCAN_TOLERANCE

from vssm import __version__
from vssm.native_library import find_library
from vssm.ops import reference, spec


@pytest.mark.parametrize("backend", [HOST, EMULATED], ids=str)
def test_library_says_what_it_is(backend):
    library = backend.load()
    assert library.vssm_version().decode() == __version__
    assert library.vssm_operator_table().decode() == spec.describe_table()
    assert library.vssm_has_cuda() in {0, 1}
    assert EMULATED.load().vssm_has_cuda() == 1


@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
@pytest.mark.parametrize("name", EXTRA)
def test_scan_on_the_cpu(name, dtype):
    case = scan_case(seqlen=37, d_inner=19, extra=EXTRA[name], dtype=dtype)
    attributes = {"params_by_step": 1, "scale": 0.5}
    expected = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    error = (run_operator(HOST, name, case, **attributes)["y"].double() - expected).abs().max()
    assert error <= SCAN_TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", [op.name for op in spec.GATHER_OPERATORS])
def test_gather_on_the_cpu(name):
    count = len(spec.OPERATORS[name].outputs) - 1
    case = gather_case(seqlen=41, widths=(5, 8)[:count], special=True)
    xs = [case[f"x{i}"] for i in range(count)]
    kept, rows = reference.token_gather(case["score"], case["position"], xs, num_keep=17)
    got = run_operator(HOST, name, case, num_keep=17)
    assert torch.equal(got["kept_position"], kept)
    assert all(torch.equal(got[f"y{i}"], rows[i]) for i in range(count))


class Raw:
    """A scan or a gather as C sees it, to spoil one part of it."""

    def __init__(self, name, backend=HOST):
        self.scan = name in EXTRA
        case = scan_case(extra=EXTRA[name]) if self.scan else gather_case()
        attributes = {} if self.scan else {"num_keep": 5}
        self.call = prepare(backend, name, case, **attributes)
        self.function = "vssm_selective_scan" if self.scan else "vssm_token_gather"
        self.op = name.encode()
        self.inputs = [describe(memory) for memory in self.call.inputs.values()]
        self.outputs = [describe(memory) for memory in self.call.outputs.values()]
        self.attributes = self.call.attributes
        self.launch = None

    def run(self, error_bytes=512):
        inputs = (CTensor * len(self.inputs))(*self.inputs)
        outputs = (CTensor * len(self.outputs))(*self.outputs)
        count = () if self.scan else (len(self.outputs),)
        error = ctypes.create_string_buffer(512)
        attributes = ctypes.byref(self.attributes) if self.attributes else None
        failed = self.call.backend.load()[self.function](
            self.op,
            inputs,
            len(inputs),
            outputs,
            *count,
            attributes,
            self.launch,
            error if error_bytes else None,
            ctypes.c_size_t(error_bytes),
        )
        return failed, error.value.decode()


def _set(target, name, value):
    return lambda raw: setattr(getattr(raw, target)[0], name, value)


def _dims(target, index, axis, value):
    return lambda raw: getattr(raw, target)[index].dims.__setitem__(axis, value)


def _drop(target):
    return lambda raw: getattr(raw, target).pop()


def _give(name, value):
    return lambda raw: setattr(raw, name, value)


REFUSED = [
    ("SelectiveScan", _give("op", b"Scan"), r"op=Scan is no scan operator; vssm_operator_table"),
    ("SelectiveScan", _give("op", b"TokenGather"), r"op=TokenGather is no scan operator"),
    ("SelectiveScan", _give("op", None), r"op=\(null\) is no scan operator"),
    ("TokenGather", _give("op", b"SelectiveScan"), r"op=SelectiveScan is no gather operator"),
    ("SelectiveScan", _drop("inputs"), r"input_count=8, but it must be 9; give them in the order"),
    ("TokenGather", _drop("outputs"), r"output_count=2, but it must be 3; give them in the order"),
    ("SelectiveScan", _set("inputs", "dtype", 4), r"dtype\(u\)=4 is outside \[0, 3\]; use a VSSM_"),
    ("TokenGather", _set("inputs", "dtype", -1), r"dtype\(score\)=-1 is outside \[0, 3\]"),
    ("TokenGather", _set("inputs", "rank", 5), r"rank\(score\)=5 is outside \[0, 4\]"),
    ("TokenGather", _set("inputs", "rank", 1), r"score has rank 1 and type float32, but it must"),
    ("TokenGather", _dims("inputs", 2, 2, -1), r"dims\[2\] of x0=-1 is negative; give the size"),
    ("SelectiveScan", _set("inputs", "data", None), r"u has no data; give its memory"),
    ("SelectiveScan", _set("outputs", "data", None), r"y has no data; give its memory"),
    ("SelectiveScan", _dims("outputs", 0, 1, 63), r"y must be float32 \(1, 64, \.\.\.\)"),
    ("SelectiveScan", _set("outputs", "dtype", 1), r"y must be float32"),
    ("TokenGather", _set("outputs", "dtype", 0), r"kept_position must be int32 \(2, 5\)"),
    ("TokenGather", _dims("outputs", 2, 2, 9), r"y1 must be float32 \(2, 5, \.\.\.\)"),
    ("SelectiveScan", _give("attributes", None), r"attributes are missing; give their struct"),
    ("TokenGather", _give("attributes", None), r"attributes are missing; give their struct"),
    ("SelectiveScan", _give("attributes", CScanAttributes(1, 0, 1.0, 3)), r"variant=3 is outside"),
    ("SelectiveScan", _give("attributes", CScanAttributes(1, 0, 1.0, 1)), r"variant=1 is for CUDA"),
    ("SelectiveScan", _give("attributes", CScanAttributes(2, 0, 1.0, 0)), r"delta_softplus=2 is"),
    ("TokenGather", _give("attributes", CGatherAttributes(65, -1)), r"num_keep=65 is outside"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_wrong_is_refused_and_nothing_written(name, spoil, message):
    raw = Raw(name)
    spoil(raw)
    failed, text = raw.run()
    assert failed == 1
    assert re.search(message, text)
    for memory in raw.call.outputs.values():
        assert (memory.buffer == 0xFF).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_give("op", None), r"op=\(null\) is no scan operator"),
        (_give("attributes", CScanAttributes(1, 0, 1.0, 1)), r"variant=1 is for CUDA; use 0"),
        (_dims("outputs", 0, 1, 63), r"y must be float32 \(1, 64, \.\.\.\)"),
        (_give("launch", 0), r"threads=0 is below 1"),
    ],
)
def test_several_threads_refuse_what_one_refuses(spoil, message):
    raw = Raw("SelectiveScan")
    raw.function, raw.launch = "vssm_selective_scan_on_threads", 2  # threads, in place of a launch
    spoil(raw)
    failed, text = raw.run()
    assert failed == 1
    assert re.search(message, text)
    for memory in raw.call.outputs.values():
        assert (memory.buffer == 0xFF).all()


def test_error_text_is_cut_or_left_out():
    raw = Raw("TokenGather")
    assert raw.run() == (0, "")
    raw.op = b"NoSuchOperator"
    assert raw.run(error_bytes=5) == (1, "op=N")
    assert raw.run(error_bytes=0) == (1, "")


def test_launch_without_a_gpu_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    raw = Raw("TokenGather")
    raw.launch = ctypes.byref(CLaunch())
    failed, text = raw.run()
    assert failed == 1
    expected = "cudaError" if HOST.load().vssm_has_cuda() else "no CUDA kernels; build it where"
    assert expected in text


@pytest.mark.parametrize("backend", [HOST, EMULATED], ids=str)
def test_calls_from_several_threads(backend):
    case = gather_case(seqlen=50, batch=3)
    expected = run_operator(backend, "TokenGather", case, num_keep=20)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(run_operator, backend, "TokenGather", case, num_keep=20) for _ in range(40)
        ]
        for call in calls:
            assert torch.equal(call.result()["y0"], expected["y0"])


@pytest.mark.parametrize("name", ["SelectiveScan", "TokenGather"])
def test_workspace_is_asked_for_without_data(name, monkeypatch):
    raw = Raw(name, EMULATED)
    monkeypatch.setattr(cuda_device, "describe", lambda memory: _without_data(describe(memory)))
    assert raw.call.workspace_bytes() >= 0
    raw.call.name = "NoSuchOperator"
    with pytest.raises(OperatorError, match="op=NoSuchOperator"):
        raw.call.workspace_bytes()


@pytest.mark.parametrize("end", [0, -1], ids=["before", "behind"])
@pytest.mark.parametrize("where", ["x0", "y0", "workspace"])
def test_a_write_beside_an_operand_is_found(where, end):
    call = Raw("TokenGather", EMULATED).call
    call.enqueue()
    memory = (call.inputs | call.outputs | {"workspace": call.workspace})[where]
    memory.buffer[memory.start - 1 if end == 0 else memory.stop] = 0
    with pytest.raises(AssertionError, match=f"{where}: written outside its memory"):
        call.results()


def _without_data(tensor):
    tensor.data = None
    return tensor


def _c_compiler():
    return (os.environ.get("CC") or shutil.which("cc") or "gcc").split()


@pytest.mark.parametrize("standard", ["c99", "c11"])
def test_header_is_c(standard):
    flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    source = '#include "plugins/c/vssm.h"\nint used(void) { return VSSM_INT32; }\n'
    command = [*_c_compiler(), *flags, f"-I{ROOT}", "-x", "c", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = re.findall(r"VSSM_(\w+) = (\d)", (ROOT / "plugins/c/vssm.h").read_text())
    by_name = {str(dtype).removeprefix("torch.").upper(): c for dtype, c in DTYPE_CODES.items()}
    assert {name: int(code) for name, code in codes} == by_name


def test_c_program_runs(tmp_path):
    """The example of docs/c_api.md, as it stands there."""
    text = (ROOT / "docs/c_api.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    (tmp_path / "keep.c").write_text(source)
    library = find_library("vssm")
    command = [
        *_c_compiler(),
        *("-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/plugins/c", "keep.c"),
        *(str(library), f"-Wl,-rpath,{library.parent}", "-o", "keep"),
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "keep"], capture_output=True, text=True, check=True)
    (expected,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert done.stdout == expected
