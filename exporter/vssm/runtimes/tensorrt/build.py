"""Builds TensorRT engines: model.onnx to a plan and what it was built from."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vssm._version import __version__
from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.artifact.manifest import BATCH
from vssm.errors import RuntimeUnavailableError, UnsupportedError, check_choice, check_least
from vssm.files.atomic import atomic_write_bytes, check_writable, sha256_of
from vssm.files.regular import ENGINE, read_regular
from vssm.files.staging import staged_directory
from vssm.native_library import find_library
from vssm.ops.spec import OPERATORS
from vssm.runtimes.cuda_memory import Cuda, GpuInfo
from vssm.runtimes.graph_edit import count_nodes, strip_functions
from vssm.runtimes.library import TENSORRT_LIBRARY, library_version
from vssm.runtimes.session import BACKENDS, checked_threads
from vssm.runtimes.tensorrt import api
from vssm.runtimes.tensorrt.engine import (
    EngineInfo,
    PluginInfo,
    check_batch,
    refuse_changes,
    write_info,
)
from vssm.runtimes.tensorrt.runner import EngineRunner
from vssm.types import Array, Steps


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        backend: "kernel" (plugin layers) or "body" (the file's fallback functions); None for
            what the runtime can do best.
        batch: (min, opt, max) of the optimisation profile.
        memory_mib: workspace limit in MiB; None for TensorRT's own, the whole GPU.
        level: builder optimisation level 0 to 5; None for TensorRT's own, 3.
        timing_cache: file that keeps measured timings; None for one named after version and GPU.
        plugins_inside: put the plugin library into the engine.
        version_compatible: let later versions of TensorRT run the engine.
        hardware_compatible: "ampere-plus" or "same-compute-capability"; None for this GPU alone.
        compute_capabilities: for tensorrt-rtx, the GPUs to compile for; empty for its own choice.
        threads: most threads of the builder on the CPU; None for TensorRT's own choice.
    """

    runtime: str = "tensorrt"
    backend: str | None = None
    batch: tuple[int, int, int] = (1, 8, 32)
    memory_mib: int | None = None
    level: int | None = None
    timing_cache: Path | None = None
    plugins_inside: bool = False
    version_compatible: bool = False
    hardware_compatible: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def product(self) -> api.Product:
        """The product of `runtime`."""
        return api.PRODUCTS[self.runtime]

    @property
    def uses_plugins(self) -> bool:
        """Whether our operators become plugin layers."""
        return (self.backend or ("kernel" if self.product.plugins else "body")) == "kernel"


def check_request(request: EngineRequest) -> None:
    """Refuse what cannot be built, before anything is loaded.

    Raises:
        ValueError: a value is out of its range, or two contradict.
    """
    if request.runtime not in api.PRODUCTS:
        raise ValueError(
            f"runtime={request.runtime!r} builds no engines; choose from {', '.join(api.PRODUCTS)}"
        )
    if request.backend is not None:
        check_choice("backend", request.backend, BACKENDS)
    check_batch(request.batch)
    check_least(1, memory_mib=request.memory_mib)
    if request.level is not None and not 0 <= request.level <= 5:
        raise ValueError(f"level={request.level} is outside [0, 5]; 3 is TensorRT's own")
    checked_threads(request.threads)
    _check_product(request)
    if request.plugins_inside and not request.uses_plugins:
        raise ValueError("plugins_inside=True with backend='body', which has no plugin; drop one")
    _check_capabilities(request.compute_capabilities)


def _check_capabilities(wanted: tuple[str, ...]) -> None:
    """A session compares them with what the GPU calls itself."""
    for capability in wanted:
        # Written "86", the engine was built and then foreign to every session.
        if not re.fullmatch(r"\d+\.\d", capability) or wanted.count(capability) > 1:
            raise ValueError(
                f"compute_capability={capability!r} is not a capability, or is there twice; give "
                "each once, such as 8.6,8.9"
            )


def _check_product(request: EngineRequest) -> None:
    name = request.product.title
    rtx_only = {"compute_capabilities": request.compute_capabilities}
    full_only = {
        "plugins_inside": request.plugins_inside,
        "timing_cache": request.timing_cache,
        "version_compatible": request.version_compatible,
        "hardware_compatible": request.hardware_compatible,
    }
    if request.backend == "kernel" and not request.product.plugins:
        raise ValueError(
            f"backend='kernel' with runtime='{request.runtime}': {name} runs no plugin layers; "
            "leave it out (the fallback bodies run), or build with full TensorRT"
        )
    for option, value in (rtx_only if request.product.plugins else full_only).items():
        if value:
            raise ValueError(f"{option}={value!r} is not an option of {name}; leave it out")


_MIB: Final = 1 << 20
_SHOWN_ERRORS: Final = 3


@dataclass(frozen=True)
class SerializedEngine:
    """A built engine, and the layers of the network that it was built from."""

    data: bytes
    layers: int


def build_engine(
    artifact: Artifact, request: EngineRequest, *, progress: Steps = lambda *_: None
) -> EngineInfo:
    """Build an engine beside model.onnx, and write what it was built from.

    Args:
        artifact: a verified export.
        request: what to build.
        progress: called with a phase's name, the step it is at, and how many there are.

    Raises:
        ValueError: the request contradicts itself.
        RuntimeUnavailableError: the package, the GPU or the plugin library is missing.
        UnsupportedError: TensorRT cannot parse or build this file.
        ArtifactError: the directory cannot be written, or its model was changed meanwhile.
    """
    check_request(request)
    _check_buildable(artifact)
    product = request.product
    # What cannot be written is said now, and not after a build that may take hours.
    for name in (product.plan, product.info):
        check_writable(artifact.directory / name)
    package = api.load_package(product)
    gpu = find_gpu(product)
    library = find_library(TENSORRT_LIBRARY) if request.uses_plugins else None
    # Hashed before it is used: afterwards another library may lie there.
    plugin = None if library is None else _describe(library, inside=request.plugins_inside)
    cache = _cache_path(artifact, request, package, gpu)
    if cache is not None:
        check_writable(cache)
    start = time.monotonic()
    with artifact.opened_model() as model:
        plan = build_plan(Path(model), request, plugin=plugin, cache=cache, progress=progress)
        nodes = count_nodes(Path(model))[0]
    seconds = time.monotonic() - start
    # A model or library that was replaced meanwhile must not be vouched for.
    refuse_changes(artifact, library, plugin)
    info = EngineInfo(
        product=product.runtime,
        version=str(package.__version__),
        gpu=None if gpu is None else gpu.name,
        compute_capability=_compiled_for(request, gpu),
        cuda=None if gpu is None else gpu.cuda,
        backend="kernel" if request.uses_plugins else "body",
        plugin=plugin,
        batch=request.batch,
        options={
            "version_compatible": request.version_compatible,
            "hardware_compatible": request.hardware_compatible,
            "level": request.level,
            "memory_mib": request.memory_mib,
        },
        nodes=nodes,
        layers=plan.layers,
        seconds=round(seconds, 3),
        model_sha256=artifact.manifest.files[MODEL_FILE],
        plan_sha256=hashlib.sha256(plan.data).hexdigest(),
        plan_bytes=len(plan.data),
        vssm=__version__,
    )
    # Together: never an old statement beside a new engine.
    pair = (product.plan, product.info)
    with staged_directory(artifact.directory, replaceable=lambda _: pair, last=pair[1]) as staging:
        (staging / product.plan).write_bytes(plan.data)
        write_info(staging / product.info, info)
    return info


def _check_buildable(artifact: Artifact) -> None:
    """Refuse exports that TensorRT cannot run, whatever is asked for."""
    manifest, quantization = artifact.manifest, artifact.manifest.quantization
    if quantization is not None and not quantization.in_tensorrt:
        raise UnsupportedError(
            f"{artifact.directory} is quantised as {quantization}, with unsigned activations, "
            "ranges measured in every run, or four bits beside float32, which TensorRT does not "
            "do; quantise the float export with --target tensorrt or portable"
        )
    if manifest.gives_boxes:
        raise UnsupportedError(
            f"{artifact.directory} is a whole detector, which finds another number of objects in "
            "every image, and is made for ONNX Runtime; export it with --outputs dense, and find "
            "boxes in the engine's outputs"
        )
    whole = [spec.name for spec in manifest.inputs if spec.shape[:1] != (BATCH,)]
    if whole and len(manifest.inputs) > 1:
        raise UnsupportedError(
            f"{artifact.directory} has inputs without a batch ({', '.join(whole)}), and an engine "
            "takes every input in batches; give them a first axis of the batch's size in the module"
        )


def find_gpu(product: api.Product) -> GpuInfo | None:
    """The GPU; TensorRT for RTX builds without one, full TensorRT does not."""
    try:
        return Cuda().gpu()
    except RuntimeUnavailableError:
        # Full TensorRT times its kernels on the GPU that is here.
        if product.plugins:
            raise
        return None


def _compiled_for(request: EngineRequest, gpu: GpuInfo | None) -> tuple[str, ...]:
    """TensorRT compiles for the GPU that is here, TensorRT for RTX for what it was told."""
    if gpu is None or not request.product.plugins:
        return request.compute_capabilities
    return (gpu.compute_capability,)


def _describe(library: Path, *, inside: bool) -> PluginInfo:
    return PluginInfo(library.name, library_version(library), sha256_of(library), inside)


def _cache_path(
    artifact: Artifact, request: EngineRequest, package: Any, gpu: GpuInfo | None
) -> Path | None:
    """Timings belong to one version and one GPU, so the file is named after them."""
    if gpu is None or not request.product.plugins:
        return None  # TensorRT for RTX times nothing while it builds
    name = f"timing-{package.__version__}-sm{gpu.compute_capability.replace('.', '')}.cache"
    return request.timing_cache or artifact.directory / name


def build_plan(
    model: Path,
    request: EngineRequest,
    *,
    plugin: PluginInfo | None = None,
    cache: Path | None = None,
    progress: Steps = lambda *_: None,
) -> SerializedEngine:
    """Parse a file and build an engine in memory; `plugin` is what the library was seen to be.

    Raises:
        RuntimeUnavailableError, UnsupportedError: as for `build_engine`.
    """
    product = request.product
    package = api.load_package(product)
    if request.uses_plugins:
        expected = None if plugin is None else plugin.sha256
        api.load_plugin(package, find_library(TENSORRT_LIBRARY), expected)
    log = api.logger(package)
    builder = package.Builder(log)
    if builder is None:
        raise UnsupportedError(f"{product.title} has no builder here: {_last(log)}")
    if request.threads is not None:
        builder.max_threads = request.threads
    network = api.create_network(package, builder)
    parser = package.OnnxParser(network, log)
    _parse(parser, model, request, package)
    _check_layers(package, network, model, request)
    config = _configure(package, builder, network, request)
    # Kept alive by this name: the builder calls it from its own threads.
    monitor = api.progress_monitor(package, progress)
    config.progress_monitor = monitor
    timings = _load_cache(config, cache)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise UnsupportedError(
            f"{product.title} {package.__version__} parsed {MODEL_FILE} but could not build an "
            f"engine: {_last(log)}; give it memory (--memory), another batch, or --backend body"
        )
    if cache is not None and timings is not None:
        atomic_write_bytes(cache, bytes(config.get_timing_cache().serialize()))
    return SerializedEngine(bytes(built), network.num_layers)


def run_graph(
    model: Path, feeds: Mapping[str, Array], *, runtime: str, backend: str
) -> dict[str, Array]:
    """Build an engine of a file for exactly these inputs, run it once, and forget it.

    For graphs with further inputs or outputs, as the parity check makes them.

    Raises:
        RuntimeUnavailableError, UnsupportedError: as for `build_plan`.
    """
    product = api.PRODUCTS[runtime]
    batch = next(iter(feeds.values())).shape[0]
    # Of a trusted engine without a statement nobody knows its operators.
    asked = backend if product.plugins and backend != "unknown" else None
    # For one batch alone: any other range would only give the builder more to search.
    plan = build_plan(model, EngineRequest(runtime, asked, batch=(batch, batch, batch)))
    # Run once, an engine repays no graph, and this one carries no code for the host.
    runner = EngineRunner(product, plan.data, Cuda(), host_code=False, graphs=False)
    try:
        return runner.run(feeds)
    finally:
        runner.close()


def _parse(parser: Any, model: Path, request: EngineRequest, package: Any) -> None:
    if request.uses_plugins and api.needs_stripping(request.product, package):
        parsed = parser.parse(strip_functions(model), str(model))
    else:
        # By its path, so that weights beside the file are found.
        parsed = parser.parse_from_file(str(model))
    if parsed:
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    # A parser that lacks an operator complains of every node that has it.
    shown = "; ".join(_describe_error(error) for error in errors[:_SHOWN_ERRORS])
    more = len(errors) - _SHOWN_ERRORS
    raise UnsupportedError(
        f"{request.product.title} {package.__version__} cannot parse {MODEL_FILE}: {shown}"
        + (f"; and {more} more" if more > 0 else "")
        + f"; {_parser_remedy(errors)}"
    )


def _parser_remedy(errors: list[Any]) -> str:
    if any(e.node_operator() in OPERATORS and not e.local_function_stack() for e in errors):
        return (
            "of our operators it found neither a plugin nor a body: rebuild the plugin library "
            "with `make setup`, or export the model again"
        )
    return "export it with another --opset, or update TensorRT"


def _describe_error(error: Any) -> str:
    """What the parser says of a node, and inside which fallback bodies it stands."""
    where = f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'})"
    stack = [str(name) for name in error.local_function_stack()]
    inside = f" in the body of {' in '.join(stack)}" if stack else ""
    return f"{where}{inside}: {error.desc()}"


def _check_layers(package: Any, network: Any, model: Path, request: EngineRequest) -> None:
    """The parser takes a body without a word where it finds no plugin, and the other way round."""
    # Counted, as the parser itself does not say which way it took.
    asked = count_nodes(model)[1] if request.uses_plugins else 0
    found = api.plugin_layers(package, network)
    if found == asked:
        return
    if asked:
        raise UnsupportedError(
            f"the parser made {found} plugin layers of {asked} operators: it took the rest from "
            "the fallback bodies; rebuild the plugin library of this version with `make setup`, "
            "or ask for --backend body"
        )
    raise UnsupportedError(
        f"backend='body' was asked for, but the parser made {found} plugin layers: the plugin "
        "library is already loaded in this process; build in a new one"
    )


def _configure(package: Any, builder: Any, network: Any, request: EngineRequest) -> Any:
    config = builder.create_builder_config()
    api.forbid_tf32(package, config)
    if request.memory_mib is not None:
        config.set_memory_pool_limit(package.MemoryPoolType.WORKSPACE, request.memory_mib * _MIB)
    if request.level is not None:
        config.builder_optimization_level = request.level
    if request.version_compatible:
        config.set_flag(package.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware_compatible is not None:
        api.set_hardware_level(package, config, request.hardware_compatible)
    if request.compute_capabilities:
        api.set_compute_capabilities(package, config, request.compute_capabilities)
    if request.plugins_inside:
        config.plugins_to_serialize = [str(find_library(TENSORRT_LIBRARY))]
    # Without a profile TensorRT builds nothing that has a dynamic axis.
    _add_profile(builder, network, config, request.batch)
    return config


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """One profile: the first axis of every input, the only dynamic one, is the batch."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        if min(rest, default=1) < 1:
            raise UnsupportedError(
                f"input {tensor.name} has shape {tuple(tensor.shape)}, but only the batch may be "
                "dynamic; export the model with this vssm"
            )
        profile.set_shape(tensor.name, *((size, *rest) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise UnsupportedError(f"TensorRT refuses the profile batch={batch}; give other sizes")


def _load_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    # Of no bytes TensorRT makes an empty cache.
    data = read_regular(path, limit=ENGINE) if path.exists() else b""
    cache = config.create_timing_cache(data)
    # False: no timings of another GPU, by which it would choose the wrong kernels.
    if cache is None or not config.set_timing_cache(cache, False):
        raise UnsupportedError(
            f"timing_cache={path} was not made by this TensorRT on this GPU; delete it, or name "
            "another file"
        )
    return cache


def _last(log: Any) -> str:
    """The last of what TensorRT complained of, the reason among it."""
    return " | ".join(log.complaints[-3:]) or "it gave no reason"
