"""`vssm engine`: engines of TensorRT for RTX, really built; engine.json; what is refused."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from checkout import ROOT
from command import SHALLOW, Run
from exports import exported, micro, shared_traces

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import ArtifactError, RuntimeUnavailableError, UnsupportedError
from vssm.files.atomic import sha256_of
from vssm.native_library import find_library
from vssm.runtimes import doctor
from vssm.runtimes.graph_edit import count_nodes, strip_functions
from vssm.runtimes.library import TENSORRT_LIBRARY
from vssm.runtimes.tensorrt.api import TENSORRT_RTX, forbid_tf32
from vssm.runtimes.tensorrt.build import EngineRequest, build_engine, check_request
from vssm.runtimes.tensorrt.engine import EngineInfo, PluginInfo, read_info, write_info

RTX = EngineRequest(runtime="tensorrt-rtx", batch=(1, 2, 4), compute_capabilities=("8.6",))
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason=f"tensorrt_rtx is not installed: {TENSORRT_RTX.install}",
)


@pytest.fixture
def out(tmp_path: Path) -> Artifact:
    return exported(tmp_path, micro())


@needs_rtx
@pytest.mark.parametrize(
    ("schedule", "dtype"), [(None, "float32"), ("1:0.7,2:0.8", "float16")], ids=["dense", "pruned"]
)
def test_rtx_builds(tmp_path: Path, schedule: str | None, dtype: str) -> None:
    out = exported(tmp_path, micro(schedule), dtype=dtype)
    phases: dict[str, int] = {}

    def progress(phase: str, step: int, steps: int) -> None:
        assert 0 <= step <= steps
        phases[phase] = step

    info = build_engine(out, RTX, progress=progress)
    plan = out.directory / "model.rtx.plan"
    assert (info.plan_sha256, info.plan_bytes) == (sha256_of(plan), plan.stat().st_size)
    assert info.model_sha256 == out.manifest.files["model.onnx"]
    assert (info.backend, info.plugin, info.batch) == ("body", None, (1, 2, 4))
    assert info.layers > info.nodes > 50
    assert phases["Building engine"] > 0
    assert read_info(out.directory / "engine.rtx.json", "vssm engine --rtx") == info


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, {10: 0.8, 16: 0.8}], ids=["dense", "pruned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rtx_builds_vim_tiny(tmp_path: Path, schedule: dict[int, float] | None, dtype: str) -> None:
    rules = None if schedule is None else vssm.PruneSchedule(schedule)
    model = vssm.create_model("vim_tiny", schedule=rules)
    out = exported(tmp_path, model, dtype=dtype)
    info = build_engine(out, dataclasses.replace(RTX, batch=(1, 8, 32)))
    assert info.layers > 8000  # 24 scan bodies


@needs_rtx
def test_the_command_says_what_the_bodies_cost(cli: Run, tmp_path: Path) -> None:
    out = exported(tmp_path, micro(None, depth=1)).directory
    command = ("engine", out, "--rtx", "--batch=1,2,3", "--compute-capability=8.6,12.0")
    assert cli(*command, "--json", tmp_path / "engine.json") == 0, cli.out
    assert "no GPU needed, batch 1-2-3, backend: body" in cli.out
    assert "runs no plugin layers" in cli.out
    info = json.loads((tmp_path / "engine.json").read_text())
    assert info["compute_capability"] == ["8.6", "12.0"]
    assert f"{info['nodes']:,} nodes became {info['layers']:,} layers" in cli.out
    assert cli("engine", out, "--rtx", "--compute-capability=9.0") == 2
    assert "compute_capability='9.0' is not one that TensorRT for RTX" in cli.out
    # A new export takes the engine of the old one away.
    with shared_traces():
        assert cli("export", *SHALLOW, "-o", out, "--force") == 0
    assert not [path.name for path in out.iterdir() if "rtx" in path.name]


@needs_rtx
def test_parser_errors_name_the_node(out: Artifact, tmp_path: Path) -> None:
    model = onnx.load(out.model_path)
    scan = next(node for node in model.graph.node if node.op_type == "SelectiveScan")
    del model.functions[:]
    broken = tmp_path / "broken"
    broken.mkdir()
    onnx.save(model, broken / "model.onnx")
    files = {**out.manifest.files, "model.onnx": sha256_of(broken / "model.onnx")}
    with pytest.raises(UnsupportedError) as caught:
        build_engine(Artifact(broken, dataclasses.replace(out.manifest, files=files)), RTX)
    message = str(caught.value)
    assert "cannot parse model.onnx: node" in message
    assert scan.name in message
    assert "(SelectiveScan)" in message
    assert "neither a plugin nor a body" in message
    assert [path.name for path in broken.iterdir()] == ["model.onnx"]


@needs_rtx
@pytest.mark.filterwarnings("ignore")
def test_the_rtx_session_says_that_there_is_no_gpu(out: Artifact) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="not installed: pip install cuda-bindings")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeUnavailableError, match=r"no GPU that CUDA can use \("):
        vssm.open_session(out, "tensorrt-rtx")


# What is called of TensorRT, and what TensorRT for RTX shares of it.
CALLED = {
    "": "Builder OnnxParser Runtime ILogger IProgressMonitor get_plugin_registry nptype",
    "Builder": "create_network create_builder_config create_optimization_profile "
    "build_serialized_network max_threads",
    "OnnxParser": "parse parse_from_file num_errors get_error",
    "ParserError": "desc node node_name node_operator local_function_stack",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input",
    "IBuilderConfig": "set_memory_pool_limit set_flag builder_optimization_level progress_monitor "
    "clear_flag add_optimization_profile create_timing_cache set_timing_cache get_timing_cache "
    "plugins_to_serialize hardware_compatibility_level set_compute_capability",
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "phase_start step_complete phase_finish",
    "IPluginRegistry": "load_library get_creator",
    "ITimingCache": "serialize",
    "LayerType": "PLUGIN_V3",
    "BuilderFlag": "VERSION_COMPATIBLE TF32",
    "MemoryPoolType": "WORKSPACE",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "HardwareCompatibilityLevel": "AMPERE_PLUS SAME_COMPUTE_CAPABILITY NONE",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "TensorIOMode": "INPUT",
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_profile_shape "
    "get_tensor_shape get_tensor_dtype create_execution_context device_memory_size_v2",
    "IExecutionContext": "set_input_shape set_tensor_address execute_async_v3 set_device_memory "
    "is_stream_capturable",
}


@needs_rtx
def test_float32_is_float32() -> None:
    """A new configuration of the real builder allows TF32."""
    import tensorrt_rtx

    config = tensorrt_rtx.Builder(tensorrt_rtx.Logger()).create_builder_config()
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32)
    forbid_tf32(tensorrt_rtx, config)
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32)


@needs_rtx
def test_a_model_that_changes_meanwhile(tmp_path: Path) -> None:
    out = exported(tmp_path, micro(None, depth=1))

    def progress(*_: object) -> None:
        with out.model_path.open("ab") as file:
            file.write(b"\x12\x01x")  # a producer's name: the same model, other bytes

    with pytest.raises(ArtifactError, match=r"model\.onnx was changed while the engine was built"):
        build_engine(out, RTX, progress=progress)
    assert not (out.directory / "model.rtx.plan").exists()


@needs_rtx
def test_the_names_that_are_called_exist() -> None:
    import tensorrt_rtx

    for owner, names in CALLED.items():
        holder = getattr(tensorrt_rtx, owner) if owner else tensorrt_rtx
        assert [name for name in names.split() if not hasattr(holder, name)] == [], owner


@needs_rtx
def test_the_plugin_library_is_registered_once() -> None:
    """Ours, in NVIDIA's own registry, in a process of its own, which ends without clean-up."""
    try:
        library = find_library(TENSORRT_LIBRARY)
    except RuntimeUnavailableError as error:
        pytest.skip(f"built only where there is a CUDA compiler: {error}")
    code = (
        "import os, sys, tensorrt_rtx\nfrom pathlib import Path\n"
        "from vssm.runtimes.tensorrt.api import load_plugin\n"
        "for _ in range(2):\n    load_plugin(tensorrt_rtx, Path(sys.argv[1]))\n"
        "registry = tensorrt_rtx.get_plugin_registry()\n"
        "os._exit(registry.get_creator('TokenGather', '1', 'vssm') is None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_rtx
def test_a_library_without_plugins_is_refused() -> None:
    """In NVIDIA's own registry, in a process of its own."""
    code = (
        "import sys, tensorrt_rtx\nfrom pathlib import Path\n"
        "from vssm.runtimes.tensorrt.api import load_plugin\n"
        "load_plugin(tensorrt_rtx, Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(find_library())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeUnavailableError: library=" in done.stderr
    assert "was refused by TensorRT" in done.stderr


@pytest.mark.parametrize(
    ("runtime", "package", "command"),
    [
        ("tensorrt", "tensorrt", "pip install tensorrt"),
        ("tensorrt-rtx", "tensorrt_rtx", "pip install --no-deps tensorrt-rtx-cu13-libs"),
    ],
)
def test_a_missing_package(
    out: Artifact, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for work in (
        lambda: vssm.open_session(out, runtime),
        lambda: build_engine(out, EngineRequest(runtime=runtime)),
    ):
        with pytest.raises(RuntimeUnavailableError, match="is missing or does not load") as caught:
            work()
        assert command in str(caught.value)


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"runtime": "ort-cpu"}, "runtime='ort-cpu' builds no engines"),
    ({"backend": "both"}, "backend='both' is not one of kernel, body"),
    ({"batch": (0, 1, 2)}, "batch=0,1,2 must grow from 1"),
    ({"batch": (4, 2, 8)}, "batch=4,2,8 must grow"),
    ({"memory_mib": 0}, "memory_mib=0 is below 1"),
    ({"level": 6}, r"level=6 is outside \[0, 5\]"),
    ({"threads": 0}, r"threads=0 is outside \[1, 1024\]"),
    ({"backend": "body", "plugins_inside": True}, "plugins_inside=True with backend='body'"),
    ({"compute_capabilities": ("8.6",)}, "compute_capabilities=.* is not an option of TensorRT;"),
    ({"runtime": "tensorrt-rtx", "plugins_inside": True}, "plugins_inside=True is not an option"),
    *(
        ({"runtime": "tensorrt-rtx", "compute_capabilities": wrong}, "give each once, such as 8.6")
        for wrong in (("86",), ("8.6", "8.6"), ("8.6", ""), ("8.6", " 8.9"))
    ),
    ({"runtime": "tensorrt-rtx", "backend": "kernel"}, "runs no plugin layers"),
    ({"runtime": "tensorrt-rtx", "timing_cache": Path("x")}, "timing_cache=.* is not an option of"),
    ({"runtime": "tensorrt-rtx", "version_compatible": True}, "version_compatible=True is no"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_REQUESTS)
def test_bad_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(EngineRequest(**changes))


def test_bad_options(cli: Run, out: Artifact) -> None:
    assert cli("engine", out.directory, "--batch=1,2") == 2
    assert "batch='1,2' is not three sizes" in cli.out
    assert cli("engine", out.directory / "absent", "--rtx") == 2
    assert "is not an export" in cli.out


INFO = EngineInfo(
    product="tensorrt",
    version="10.13.3.9",
    gpu="NVIDIA H100",
    compute_capability=("9.0",),
    cuda="13.0",
    backend="kernel",
    plugin=PluginInfo("libvssm_tensorrt.so", "0.1.0", "a" * 64, inside=False),
    batch=(1, 8, 32),
    options={"version_compatible": False},
    nodes=10,
    layers=20,
    seconds=1.5,
    model_sha256="b" * 64,
    plan_sha256="c" * 64,
    plan_bytes=5,
    vssm="0.1.0",
)


def test_info_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    write_info(path, INFO)
    assert read_info(path, "vssm engine") == INFO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version=2 is newer than 1"),
        ({"batch": [8, 1, 32]}, r"batch=\[8, 1, 32\] must grow"),
        ({"batch": [1, 8]}, "batch has 2 elements"),
        ({"plan_sha256": "C" * 64}, "plan_sha256=.* must be 64"),
        ({"plugin": None}, "backend='kernel' and plugin=None contradict"),
        ({"product": "tensorflow"}, "product='tensorflow' must be one of"),
        ({"plan_bytes": True}, "plan_bytes=True must be an integer"),
    ],
)
def test_damaged_info(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({**dataclasses.asdict(INFO), **changes}))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_info(path, "vssm engine")
    assert f"build it with `vssm engine {tmp_path}`" in str(caught.value)


def test_stripping_leaves_the_nodes(out: Artifact) -> None:
    before = out.model_path.read_bytes()
    stripped = onnx.load_from_string(strip_functions(out.model_path))
    assert len(stripped.functions) == 0
    assert len(onnx.load_from_string(before).functions) > 0
    assert (len(stripped.graph.node), 8) == count_nodes(out.model_path)
    assert out.model_path.read_bytes() == before


def test_doctor_names_what_engines_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Path:
        raise RuntimeUnavailableError(f"library=lib{name}.so is in none of /a, /b")

    monkeypatch.setattr(doctor, "find_library", absent)
    found = {finding.part: finding for finding in doctor.examine()}
    plugin = found["TensorRT plugin library"]
    assert not plugin.found
    assert "libvssm_tensorrt.so is in none of /a, /b; it takes a CUDA compiler" in plugin.remedy
    for package in ("tensorrt", "tensorrt-rtx-cu13", "cuda-bindings"):
        assert found[package].found or "pip install" in found[package].remedy


def test_doctor_finds_a_tensorrt_of_another_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in {"tensorrt-cu12", "tensorrt-rtx-cu12"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return "10.16.1.11"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = [f for f in doctor.examine() if f.detail == "10.16.1.11"]
    assert {(f.part, f.found) for f in found} == {
        ("tensorrt-cu12", True),
        ("tensorrt-rtx-cu12", True),
    }


# What docs/troubleshooting.md quotes of ours, without the values in it.
QUOTED = [
    "is in none of ",
    " plugin layers of ",
    " cannot parse ",
    "foreign, built for ",
    "foreign, built by ",
    "stale, built from a ",
    "stale, built with ",
    "tampered or damaged, its sha256 is ",
    " cannot load the engine: ",
    " was not made by this TensorRT on this GPU",
    "could not build an ",
    " is not one that TensorRT for RTX ",
    " compiles for",
    "is missing or does ",
    "the package cuda-bindings (of cuda-python) is missing",
    "no GPU that CUDA can use (",
    " is outside the engine's [",
]


@functools.cache
def _constants() -> list[str]:
    """Every string in the package."""
    return [
        node.value
        for path in (ROOT / "exporter/vssm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("phrase", QUOTED)
def test_troubleshooting_quotes_what_is_printed(phrase: str) -> None:
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split())
    assert phrase.strip() in page
    assert any(phrase in text for text in _constants())
