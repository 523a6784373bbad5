"""The emulation of CUDA: it computes what a GPU does, and shows what a GPU may hide."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import ROOT

KERNELS = ROOT / "plugins/kernels"
EMULATION = ROOT / "plugins/emulation"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
SEEDS = range(20)


def compile_probes(folder: Path, *flags: str) -> Path:
    """probes.cu over the emulation, as a library."""
    library = folder / "libprobes.so"
    sources = [
        *(EMULATION / f"{name}.cpp" for name in ("device", "fiber", "scheduler")),
        KERNELS / "types.cpp",
    ]
    command = [
        *(os.environ.get("CXX") or shutil.which("c++") or "g++").split(),
        *("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"),
        *(f"-I{ROOT}", "-DVSSM_CUDA_EMULATION", *flags, "-x", "c++"),
        *map(str, [ROOT / "tests/plugins/cuda/probes.cu", *sources]),
        *("-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.fixture(scope="module", params=["", "-DVSSM_EMULATION_UCONTEXT"], ids=["own", "ucontext"])
def probes(tmp_path_factory, request):
    flags = [request.param] if request.param else []
    library = ctypes.CDLL(str(compile_probes(tmp_path_factory.mktemp("probes"), *flags)))

    def run(name, *arguments, seed=0):
        library.vssm_emulation_set_seed(ctypes.c_uint64(seed))
        call = library[f"probe_{name}"]
        call.restype = ctypes.c_char_p
        return call(*arguments).decode()

    return run


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def rotated(probes, seed, *arguments, name="rotate", count=256):
    out = np.full(count, -7, np.int32)
    assert probes(name, *arguments, pointer(out), seed=seed) == ""
    return out.tolist()


def test_barriers_make_it_right_in_any_order(probes):
    expected = [(i + 2) % 256 for i in range(256)]
    for seed in SEEDS:
        assert rotated(probes, seed, 1, 1) == expected


@pytest.mark.parametrize("missing", [(0, 1), (1, 0)], ids=["after_write", "before_rewrite"])
def test_missing_barrier_shows(probes, missing):
    expected = [(i + 2) % 256 for i in range(256)]
    wrong = [seed for seed in SEEDS if rotated(probes, seed, *missing) != expected]
    assert len(wrong) == len(SEEDS)


def test_missing_warp_barrier_shows(probes):
    expected = [i ^ 1 for i in range(32)]
    run = functools.partial(rotated, name="rotate_in_warp", count=32)
    assert all(run(probes, seed, 1) == expected for seed in SEEDS)
    assert all(run(probes, seed, 0) != expected for seed in SEEDS)


def test_diverging_barriers_are_refused(probes):
    message = probes("diverging_barriers")
    assert "wait for each other" in message
    assert message.count("__syncthreads") == 2


def test_shuffle_that_a_lane_does_not_reach_is_refused(probes):
    message = probes("shuffle_without_a_lane", pointer(np.zeros(32, np.int32)))
    assert "threadIdx.x=0 at a shuffle, threadIdx.x=5 at __syncthreads" in message


def test_returned_threads_are_not_waited_for(probes):
    out = np.zeros(32, np.int32)
    for seed in SEEDS:
        assert probes("early_return", pointer(out), seed=seed) == ""
        assert out.tolist() == [0 if i % 3 == 0 else 21 for i in range(32)]


def test_blocks_run_in_an_order_of_the_seed(probes):
    orders = set()
    for seed in [*SEEDS, *SEEDS]:
        out = np.zeros(9, np.int32)
        assert probes("count_blocks", pointer(out), seed=seed) == ""
        assert sorted(out[1:]) == list(range(8))
        orders.add(tuple(out.tolist()))
    assert 10 < len(orders) <= len(SEEDS)


def test_shared_memory_starts_as_nan_in_each_block(probes):
    out = np.zeros(2, np.float32)
    assert probes("unwritten", pointer(out)) == ""
    assert np.isnan(out).all()


def warp_operations():
    """What row r of the probe's output must hold."""
    lanes = range(32)
    return [
        [8] * 32,
        [lane // 8 * 8 + 3 for lane in lanes],
        [max(lane - 3, 0) if lane >= 3 else lane for lane in lanes],
        [lane - 3 if lane % 16 >= 3 else lane for lane in lanes],
        [lane + 5 if lane + 5 < 32 else lane for lane in lanes],
        [lane + 5 if lane % 16 + 5 < 16 else lane for lane in lanes],
        [lane ^ 7 for lane in lanes],
        [lane if lane < 16 else lane ^ 16 for lane in lanes],
        [sum(1 << lane for lane in lanes if lane % 5 == 0)] * 32,
        [2] * 32,
        [2] * 32,
        [0xFFFF] * 16 + [-0x10000] * 16,
        [9] * 32,
    ]


def test_warp_operations(probes):
    for seed in SEEDS:
        out = np.zeros((13, 32), np.int32)
        assert probes("warp_operations", pointer(out), seed=seed) == ""
        assert out.tolist() == warp_operations()


def test_blocks_and_threads_of_three_dimensions(probes):
    out = np.zeros(12 * 24, np.int32)
    assert probes("places", pointer(out)) == ""
    assert out.tolist() == list(range(24)) * 12


def _floats() -> torch.Tensor:
    """Every float16 and bfloat16, what lies between two, and a float32 next to those."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()])
    halves = halves[halves.isfinite()].sort().values.unique()
    between = ((halves[1:].double() + halves[:-1].double()) / 2).float()
    near = torch.cat([between, halves])
    up, down = torch.full_like(near, torch.inf), torch.full_like(near, -torch.inf)
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0, 3.4e38])
    return torch.cat([near, near.nextafter(up), near.nextafter(down), ends])


def assert_halves(given, out, *, exp2_tolerance):
    """The rows of the probe's output: through float16, through bfloat16, exp2."""
    for row, dtype in enumerate([torch.float16, torch.bfloat16]):
        assert torch.equal(out[row].nan_to_num(12345), given.to(dtype).float().nan_to_num(12345))
    normal = given.abs() >= 2.0**-126
    flushed = torch.where(normal | given.isnan(), given, 0.0)
    expected = torch.exp2(flushed.double()).float()
    expected = torch.where(expected < 2.0**-126, 0.0, expected)
    torch.testing.assert_close(out[2], expected, rtol=exp2_tolerance, atol=0, equal_nan=True)


def test_halves_and_exp2_round_as_on_a_gpu(probes):
    given = _floats()
    out = torch.zeros(3, given.numel())
    arguments = [ctypes.c_void_p(t.data_ptr()) for t in (given, out)]
    assert probes("halves", *arguments, ctypes.c_int32(given.numel())) == ""
    assert_halves(given, out, exp2_tolerance=3e-7)


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_emulation(tmp_path):
    """The right probes, compiled by nvcc, give on a GPU what the emulation gives."""
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no CUDA compiler: nvcc in the PATH")
    command = [nvcc, "-std=c++17", f"-I{ROOT}", "-arch=native", "-Xcompiler", "-fPIC", "-shared"]
    files = [ROOT / "tests/plugins/cuda/probes.cu", KERNELS / "types.cpp"]
    subprocess.run([*command, *map(str, files), "-o", str(tmp_path / "probes.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "probes.so"))

    def run(name, out, *arguments):
        call = library[f"probe_{name}"]
        call.restype = ctypes.c_char_p
        address = ctypes.c_void_p(out.data_ptr())
        before = [a for a in arguments if not isinstance(a, torch.Tensor)]
        given = [ctypes.c_void_p(a.data_ptr()) for a in arguments if isinstance(a, torch.Tensor)]
        count = [ctypes.c_int32(a.numel()) for a in arguments if isinstance(a, torch.Tensor)]
        assert call(*before, *given, address, *count).decode() == ""
        torch.cuda.synchronize()
        return out.cpu()

    def integers(*shape):
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    assert run("rotate", integers(256), 1, 1).tolist() == [(i + 2) % 256 for i in range(256)]
    assert run("rotate_in_warp", integers(32), 1).tolist() == [i ^ 1 for i in range(32)]
    assert run("early_return", integers(32)).tolist() == [
        0 if i % 3 == 0 else 21 for i in range(32)
    ]
    assert run("warp_operations", integers(13, 32)).tolist() == warp_operations()
    assert run("places", integers(12 * 24)).tolist() == list(range(24)) * 12
    given = _floats()
    out = run("halves", torch.zeros(3, given.numel(), device="cuda"), given.cuda())
    assert_halves(given, out, exp2_tolerance=2.0**-21)


@pytest.mark.parametrize(
    ("grid_y", "threads", "shared_bytes", "allowed"),
    [
        (1, 1024, 0, True),
        (1, 1025, 0, False),
        (1, 0, 0, False),
        (0, 1, 0, False),
        (65_536, 1, 0, False),
        (1, 1, 227 << 10, True),
        (1, 1, (227 << 10) + 1, False),
    ],
)
def test_launches_have_the_limits_of_a_gpu(probes, grid_y, threads, shared_bytes, allowed):
    message = probes("launch", grid_y, threads, ctypes.c_int64(shared_bytes))
    assert (message == "") == allowed
    assert allowed or "exceed what a device takes" in message


def _sanitized(library: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter with AddressSanitizer in front, `library` loaded as `lib`."""
    compiler = (os.environ.get("CXX") or shutil.which("c++") or "g++").split()
    asan = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    script = f"import ctypes\nlib = ctypes.CDLL({str(library)!r})\n{code}"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_sanitizers_see_what_goes_astray(tmp_path):
    library = compile_probes(tmp_path, *SANITIZE)
    out = "out = (ctypes.c_int32 * 256)()\n"
    fine = _sanitized(library, out + "lib.probe_rotate(1, 1, out)\nlib.probe_early_return(out)")
    assert fine.returncode == 0, fine.stderr[-2000:]
    dynamic = _sanitized(library, "lib.probe_astray(0)")
    assert "heap-buffer-overflow" in dynamic.stderr
    static = _sanitized(library, "lib.probe_astray(1)")
    assert "cuda_probes.cu" in static.stderr
    assert "runtime error: " in static.stderr
    unaligned = _sanitized(library, "lib.probe_astray(2)")
    assert "misaligned address" in unaligned.stderr
