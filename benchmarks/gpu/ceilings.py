"""The card's limits: exp2 rate, copy bandwidth, a launch in a graph; and which card it is."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from importlib import metadata

import torch
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.timing import Clock, Subject, measure

from vssm.native_library import find_library

_BLOCKS_PER_SM = 8
_ROUNDS = 4096
_COPY_BYTES = 1 << 30
_LAUNCHES = 200
_PACKAGES = ("torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "mamba-ssm")


def run(report: Report, clock: Clock) -> None:
    """Measure all three, and say what the machine is."""
    report.line(machine=facts(clock))
    library = ctypes.CDLL(str(find_library("vssm_gpu_bench")))
    properties = torch.cuda.get_device_properties(clock.device)
    blocks = properties.multi_processor_count * _BLOCKS_PER_SM
    sink = torch.empty(blocks * library.vssm_gpu_threads(), device=clock.device)
    free, _ = torch.cuda.mem_get_info(clock.device)
    count = min(_COPY_BYTES, free // 8)
    source = torch.zeros(count, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)

    def ex2(_: int) -> None:
        code = library.vssm_gpu_ex2(_stream(), ctypes.c_void_p(sink.data_ptr()), blocks, _ROUNDS)
        _refuse(code)

    def launches(_: int) -> None:
        for _ in range(_LAUNCHES):
            _refuse(library.vssm_gpu_nothing(_stream()))

    subjects = [
        Subject("ex2", ex2),
        Subject("copy", lambda _: target.copy_(source)),
        Subject("launch", launches),
    ]
    times = {t.subject: t.percentile(50) for t in measure(subjects, clock, lost=report.wrong)}
    evaluations = blocks * _ROUNDS * library.vssm_gpu_ex2_per_block()
    if len(times) == len(subjects):
        found = {
            "ex2_per_s": 1e6 * evaluations / times["ex2"],
            "copy_bytes_per_s": 1e6 * 2 * count / times["copy"],
            "launch_us": times["launch"] / _LAUNCHES,
        }
        report.line(ceilings=found)


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _refuse(code: int) -> None:
    if code:
        raise RuntimeError("a kernel of libvssm_gpu_bench.so could not be launched")


def facts(clock: Clock) -> dict[str, str]:
    """Card, driver, versions, processor."""
    properties = torch.cuda.get_device_properties(clock.device)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "last-level cache": f"{clock.cache_bytes / 2**20:.0f} MiB",
        "driver, clock limit, power limit": _driver(),
        "CUDA of torch": str(torch.version.cuda),
        "python": platform.python_version(),
        "platform": f"{platform.machine()}, {sys.platform}",
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    command = [*query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main("ceilings", run)
