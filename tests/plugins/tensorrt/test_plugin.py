"""The TensorRT plugin through its whole life, played by the harness of tests/tensorrt_harness."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    EXTRA,
    SCATTER_SIZES,
    conv_case,
    gather_case,
    grid_case,
    scan_case,
    scan_reference_arguments,
    scatter_case,
)
from native import output_shapes, output_types
from tensorrt_build import ROOT, VERSIONS, build_harness, harness, real_library
from tolerances import GPU_SCAN_TOLERANCE, SCAN_TOLERANCE, relative_error

from vssm import __version__
from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library
from vssm.ops import reference
from vssm.ops.spec import OPERATORS, SCAN_OPERATORS, describe_table

TYPES = {t: str(t).removeprefix("torch.") for t in SCAN_TOLERANCE} | {torch.int32: "int32"}
COST_NS = 10_000
# What must not run on a host's memory: the launchers of the library that ships.
NO_GPU = "none"


def _emulated() -> Path:
    return find_library("vssm_tensorrt_emulated")


def _library_with_kernels(device: str) -> Path:
    return _emulated() if device == "host" else real_library()


DEVICES = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_life(version):
    built = harness()
    built.run(built.stub, "life", "stub", version=version)


@pytest.mark.parametrize("device", DEVICES)
def test_life_with_kernels(device):
    harness().run(_library_with_kernels(device), "life", device)


def test_life_of_the_library_that_ships_without_a_gpu():
    """Everything but enqueue, which must return an error and say why."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_life_with_kernels runs it")
    harness().run(real_library(), "life", NO_GPU)


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_refusals(version):
    built = harness()
    built.run(built.stub, "refuse", version=version)


def test_refusals_of_the_library_that_ships():
    harness().run(real_library(), "refuse")


def test_messages_survive_an_unknown_tensorrt():
    """Its logger's ABI is unknown, so that it is not called; the message goes to stderr."""
    built = harness()
    command = [str(built.program), "--version", "10701", str(built.stub), "refuse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "vssm: node blocks.3: TokenGather: num_keep=0 is outside [1, seqlen]" in done.stderr
    assert done.returncode == 1  # the harness's logger got nothing


def test_enqueue_costs_the_host_little():
    built = harness()
    lines = built.run(built.stub, "cost", "2000").splitlines()
    cost = {name: float(ns) for name, ns in map(str.split, lines)}
    assert set(cost) == set(OPERATORS)
    assert max(cost.values()) < COST_NS, cost


def _counts(printed: str) -> dict[str, int]:
    words = printed.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def test_fuzz():
    """A sample; what 100,000 do to sanitizers is among the slow tests."""
    built = harness()
    counts = _counts(built.run(built.stub, "fuzz", "20000", "1"))
    assert counts["tried"] == 20_000
    assert min(counts["accepted"], counts["refused"]) > 1000


@pytest.mark.slow
def test_fuzz_under_sanitizers():
    built = harness(sanitize=True)
    counts = _counts(built.run(built.stub, "fuzz", "100000", "2"))
    assert counts["tried"] == 100_000
    assert min(counts["accepted"], counts["refused"]) > 5000


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("life", "stub"), ("refuse",)], ids=lambda mode: mode[0])
def test_sanitizers(mode):
    built = harness(sanitize=True)
    built.run(built.stub, *mode)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["overrun", "leak"])
def test_sanitizers_see(damage):
    """A harness that reads a byte too much, or forgets a plugin, is stopped."""
    built = harness(sanitize=True)
    command = [str(built.program), str(built.stub), "break", damage]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2)
    expected = "heap-buffer-overflow" if damage == "overrun" else "detected memory leaks"
    assert expected in done.stderr


def test_libraries_tell_what_they_are():
    built = harness()
    paths = {built.stub: "harness", _emulated(): __version__}
    with contextlib.suppress(RuntimeUnavailableError):  # absent where there is no CUDA compiler
        paths |= {find_library(n): __version__ for n in ("vssm_tensorrt", "vssm_tensorrt_autoload")}
    code = (
        "import ctypes, os, sys\nlibrary = ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)\n"
        "for f in (library.vssm_version, library.vssm_operator_table):\n"
        "    f.restype = ctypes.c_char_p\n    sys.stdout.write(f().decode() + '\\f')"
    )
    for path, version in paths.items():
        shown = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True)
        assert shown.split("\f")[:2] == [version, describe_table()]


def test_autoload_without_tensorrt_says_so():
    path = real_library("vssm_tensorrt_autoload")
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "vssm: autoload: no TensorRT in this process yet; load it first" in done.stderr


def test_library_that_ships_exports_its_entry_points_only():
    path = real_library()
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils)")
    shown = subprocess.check_output([nm, "-D", "--defined-only", str(path)], text=True)
    names = {line.split()[-1] for line in shown.splitlines()}
    assert names == {"getCreators", "setLoggerFinder", "vssm_operator_table", "vssm_version"}
    needed = subprocess.check_output(["readelf", "-d", str(path)], text=True)
    assert "nvinfer" not in needed
    assert "cudart" not in needed


@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="TENSORRT_ROOT is not set (an SDK)")
def test_our_abi_is_that_of_the_sdk(tmp_path):
    """Builds the plugin with the SDK's headers and compares our declarations with them."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": tools}
    root = f"-DTENSORRT_ROOT={os.environ['TENSORRT_ROOT']}"
    options = ["-DVSSM_CUDA_ARCHITECTURES=90-real", "-DVSSM_CUDA=ON", "-DVSSM_WERROR=ON", root]
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *options]
    targets = ["vssm_tensorrt", "vssm_tensorrt_autoload", "vssm_tensorrt_abi_check"]
    subprocess.run(configure, env=environment, check=True)
    build = ["cmake", "--build", str(tmp_path), "--target", *targets]
    subprocess.run(build, env=environment, check=True)
    folder = tmp_path / "plugins" / "tensorrt"
    shown = subprocess.check_output([str(folder / "vssm_tensorrt_abi_check")], text=True)
    assert ": 0 of 37 slots differ" in shown
    harness().run(folder / "libvssm_tensorrt.so", "refuse")


@pytest.mark.skipif("TENSORRT_ROOT" not in os.environ, reason="TENSORRT_ROOT is not set (an SDK)")
def test_a_harness_of_the_sdk_drives_our_plugin(tmp_path):
    """The harness is built with the SDK's headers, the plugin with our declarations."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = f"{os.environ['TENSORRT_ROOT']}/include;{cuda}/include"
    built = build_harness(tmp_path, f"-DTENSORRT_INCLUDE_DIRS={folders}")
    for mode in (("life", "stub"), ("refuse",), ("fuzz", "20000", "1")):
        built.run(built.stub, *mode)


def _write_case(folder: Path, name: str, inputs, attributes) -> Path:
    """A case in the harness's form; outputs come back as <name>.bin.<tactic> beside it."""
    folder.mkdir()
    lines = [f"op {name}", *(f"attribute {n} {v}" for n, v in attributes.items())]

    def line(kind, operand, dtype, shape):
        sizes = " ".join(map(str, shape))
        lines.append(f"{kind} {operand} {TYPES[dtype]} {len(shape)} {sizes} {operand}.bin")

    for operand in OPERATORS[name].inputs:
        tensor = inputs[operand.name].contiguous()
        line("input", operand.name, tensor.dtype, tensor.shape)
        tensor.view(-1).view(torch.uint8).numpy().tofile(folder / f"{operand.name}.bin")
    types = output_types(name, inputs)
    for output, shape in output_shapes(name, inputs, attributes).items():
        line("output", output, types[output], shape)
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
    return folder / "case.txt"


def _read_outputs(folder: Path, name: str, inputs, attributes, tactic=0) -> dict[str, torch.Tensor]:
    types = output_types(name, inputs)
    return {
        output: torch.from_numpy(np.fromfile(folder / f"{output}.bin.{tactic}", np.uint8))
        .view(types[output])
        .reshape(shape)
        for output, shape in output_shapes(name, inputs, attributes).items()
    }


# Odd sizes, per-image orders, shared axes, one image and several.
SCANS = [
    {"seqlen": 1, "d_inner": 1, "d_state": 1, "directions": 1},
    {"seqlen": 37, "d_inner": 19, "d_state": 16, "directions": 2, "batch": 3, "per_image": True},
    {"seqlen": 40, "d_inner": 16, "d_state": 5, "directions": 4, "shared": "udACD"},
    {"seqlen": 65, "d_inner": 8, "d_state": 1, "directions": 4, "shared": "u", "batch": 2},
    {"seqlen": 21, "d_inner": 24, "d_state": 40, "directions": 2, "decay": "head", "batch": 2},
]
TACTICS = (0, 1, 2)  # what the kernel takes by itself, and its variants
MODES = [
    ("host", "stream"),
    *(pytest.param("cuda", m, marks=pytest.mark.gpu) for m in ("stream", "graph")),
]


@pytest.mark.parametrize(("device", "mode"), MODES)
@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [spec.name for spec in SCAN_OPERATORS])
def test_scans_match_the_oracle(name, dtype, device, mode, tmp_path):
    attributes = [
        {"scale": 0.5 if i % 2 else 1.0, "params_by_step": int(i == 2), "delta_softplus": 1}
        for i in range(len(SCANS))
    ]
    cases = [scan_case(**size, extra=EXTRA[name], dtype=dtype) for size in SCANS]
    files = [
        _write_case(tmp_path / str(i), name, case, attributes[i]) for i, case in enumerate(cases)
    ]
    harness().run(_library_with_kernels(device), "run", device, mode, *map(str, files))
    tolerance = (SCAN_TOLERANCE if device == "host" else GPU_SCAN_TOLERANCE)[dtype]
    for i, case in enumerate(cases):
        expected = reference.selective_scan(**scan_reference_arguments(case), **attributes[i])
        for tactic in TACTICS:
            got = _read_outputs(tmp_path / str(i), name, case, attributes[i], tactic)["y"].double()
            error = relative_error(got, expected)
            assert float(error) <= tolerance, (SCANS[i], tactic)


@pytest.mark.parametrize(("device", "mode"), MODES)
@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
def test_convolutions_match_the_oracle(dtype, device, mode, tmp_path):
    case = conv_case(seqlen=37, d_inner=20, batch=3, dtype=dtype)
    attributes = {"by_position": 1, "activation": 0}
    file = _write_case(tmp_path / "case", "TokenConv", case, attributes)
    harness().run(_library_with_kernels(device), "run", device, mode, str(file))
    got = _read_outputs(tmp_path / "case", "TokenConv", case, attributes)["y"].double()
    want = reference.token_conv(**scan_reference_arguments(case), **attributes)
    assert relative_error(got, want) <= SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize(("device", "mode"), MODES)
@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
def test_convolutions_over_a_grid_match_the_oracle(dtype, device, mode, tmp_path):
    # The harness's profile reaches to twice as many tokens.
    case, attributes = grid_case(grid=(8, 8), seqlen=29, d_inner=20, batch=3, dtype=dtype)
    attributes["activation"] = 0
    file = _write_case(tmp_path / "case", "TokenConv2D", case, attributes)
    harness().run(_library_with_kernels(device), "run", device, mode, str(file))
    got = _read_outputs(tmp_path / "case", "TokenConv2D", case, attributes)["y"].double()
    want = reference.token_conv2d(**scan_reference_arguments(case), **attributes)
    assert relative_error(got, want) <= SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize(("device", "mode"), MODES)
@pytest.mark.parametrize("dtype", SCAN_TOLERANCE, ids=str)
def test_scatters_are_the_oracle(dtype, device, mode, tmp_path):
    cases = [scatter_case(**sizes, dtype=dtype) for sizes in SCATTER_SIZES]
    files = [
        _write_case(tmp_path / str(i), "TokenScatter", case, {}) for i, case in enumerate(cases)
    ]
    harness().run(_library_with_kernels(device), "run", device, mode, *map(str, files))
    for i, case in enumerate(cases):
        got = _read_outputs(tmp_path / str(i), "TokenScatter", case, {})["y"]
        assert torch.equal(got, reference.token_scatter(**case))


def test_scans_with_directions_outside(tmp_path):
    case = scan_case(seqlen=21, d_inner=8, directions=4, batch=2)
    want = reference.selective_scan(**scan_reference_arguments(case))
    for name in ("u", "delta", "B", "C"):
        case[name] = case[name].transpose(1, 2).contiguous()
    attributes = {"direction_axis": 1}
    file = _write_case(tmp_path / "case", "SelectiveScan", case, attributes)
    harness().run(_emulated(), "run", "host", "stream", str(file))
    for tactic in TACTICS:
        got = _read_outputs(tmp_path / "case", "SelectiveScan", case, attributes, tactic)["y"]
        assert relative_error(got, want) <= 6e-7


GATHERS = [
    (name, types) for name in ("TokenGather", "TokenGather1") for types in OPERATORS[name].types
]


@pytest.mark.parametrize(("device", "mode"), MODES)
@pytest.mark.parametrize(("name", "types"), GATHERS, ids=str)
def test_gathers_match_the_oracle(name, types, device, mode, tmp_path):
    dtypes = tuple(getattr(torch, t) for t in types)
    attributes = {"num_keep": 30, "protected_position": 0}
    case = gather_case(
        seqlen=37, batch=3, widths=(19, 8)[: len(types)], dtypes=dtypes, ties=True, special=True
    )
    case["position"][:, 18] = 0  # protected; nothing else is at 0 but a first slot
    case["position"][:, 0] = 900
    file = _write_case(tmp_path / "case", name, case, attributes)
    harness().run(_library_with_kernels(device), "run", device, mode, str(file))
    got = _read_outputs(tmp_path / "case", name, case, attributes)
    xs = [case[f"x{i}"] for i in range(len(types))]
    kept, ys = reference.token_gather(case["score"], case["position"], xs, **attributes)
    assert torch.equal(got["kept_position"].long(), kept.long())
    for i, y in enumerate(ys):
        assert torch.equal(got[f"y{i}"], y)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("no compute-sanitizer (part of the CUDA toolkit)")
    prefix = [found, "--tool", tool, "--error-exitcode", "9"]
    harness().run(real_library(), "life", "cuda", prefix=prefix)
