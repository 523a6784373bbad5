"""TensorRT 10.0 to 11.x and TensorRT for RTX: which package each is, and where they differ.

No other file asks for a version. The differences were read in the Python bindings of NVIDIA's
public repository at releases 10.0, 10.1, 10.7, 10.12, 11.0 and 11.1, and tried on TensorRT for RTX
1.7.1; docs/engine.md says what ran.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.files.private import library_copy
from vssm.ops.spec import DOMAIN, OPERATOR_VERSION

_A_PLUGIN: Final = "SelectiveScan"


@dataclass(frozen=True)
class Product:
    """One of NVIDIA's two TensorRTs.

    Attributes:
        runtime: what `--runtime` calls it.
        title: what people call it.
        install: the command that brings its Python package.
        plan: file name of an engine beside model.onnx.
        info: file name of what `vssm engine` says of that engine.
        command: the command that builds one.
        plugins: whether it runs plugin layers; if not, the fallback bodies run.
    """

    runtime: str
    title: str
    install: str
    plan: str
    info: str
    command: str
    plugins: bool


TENSORRT: Final = Product(
    runtime="tensorrt",
    title="TensorRT",
    install="pip install tensorrt",
    plan="model.plan",
    info="engine.json",
    command="vssm engine",
    plugins=True,
)
TENSORRT_RTX: Final = Product(
    runtime="tensorrt-rtx",
    title="TensorRT for RTX",
    install=(
        "pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13"
    ),
    plan="model.rtx.plan",
    info="engine.rtx.json",
    command="vssm engine --rtx",
    plugins=False,
)
PRODUCTS: Final = {product.runtime: product for product in (TENSORRT, TENSORRT_RTX)}


def load_package(product: Product) -> Any:
    """The Python package of a product.

    Raises:
        RuntimeUnavailableError: it is not installed, does not load, or is too old.
    """
    try:
        if product is TENSORRT:
            import tensorrt as package
        else:
            import tensorrt_rtx as package
    # The package loads TensorRT's libraries on import; one that is missing is no ImportError.
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"runtime={product.runtime}: the Python package of {product.title} is missing or does "
            f"not load ({error}), which builds and runs engines; {product.install}"
        ) from error
    if product is TENSORRT and version_of(package) < (10, 0):
        raise RuntimeUnavailableError(
            f"tensorrt={package.__version__} is older than 10.0, the first with the plugin "
            "interface that our library has; pip install --upgrade tensorrt"
        )
    return package


def version_of(package: Any) -> tuple[int, ...]:
    """Its version as integers: (10, 13, 3, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(package.__version__))[:4])


def needs_stripping(product: Product, package: Any) -> bool:
    """Whether a function body in the file hides the plugin: before 10.7 it is taken first."""
    return product is TENSORRT and version_of(package) < (10, 7)


def create_network(package: Any, builder: Any) -> Any:
    """A strongly typed network. Version 11 has no other kind; the flag stays, without effect."""
    flags = package.NetworkDefinitionCreationFlag.__members__
    bits = 1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0
    return builder.create_network(bits)


def forbid_tf32(package: Any, config: Any) -> None:
    """float32 is float32: TF32, which TensorRT allows unasked, has ten bits of mantissa."""
    flags = package.BuilderFlag
    if hasattr(flags, "TF32"):
        config.clear_flag(flags.TF32)


def set_hardware_level(package: Any, config: Any, level: str) -> None:
    """Let the engine run on other GPUs: "ampere-plus", or since 10.9 "same-compute-capability".

    Raises:
        UnsupportedError: this version has no such level.
    """
    known = package.HardwareCompatibilityLevel.__members__
    name = level.upper().replace("-", "_")
    if name not in known or name == "NONE":
        levels = ", ".join(k.lower().replace("_", "-") for k in known if k != "NONE")
        raise UnsupportedError(
            f"hardware_compatible={level!r} is not one that TensorRT {package.__version__} has; "
            f"choose from {levels}"
        )
    config.hardware_compatibility_level = known[name]
    if config.hardware_compatibility_level != known[name]:  # some products drop it without a word
        raise UnsupportedError(
            f"hardware_compatible={level!r} is not taken by TensorRT {package.__version__} with "
            "these options; leave it out, or the others"
        )


def set_compute_capabilities(package: Any, config: Any, wanted: tuple[str, ...]) -> None:
    """What GPUs TensorRT for RTX compiles for, "8.6"; none named leaves its own choice.

    Raises:
        UnsupportedError: one is not supported.
    """
    known = package.ComputeCapability.__members__
    # The number first: a place beyond it is refused.
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = f"SM{capability.replace('.', '')}"
        if name not in known or not config.set_compute_capability(known[name], index):
            listed = ", ".join(f"{k[2:-1]}.{k[-1]}" for k in known if k.startswith("SM"))
            raise UnsupportedError(
                f"compute_capability={capability!r} is not one that TensorRT for RTX "
                f"{package.__version__} compiles for; choose from {listed}"
            )


def activation_bytes(engine: Any) -> int:
    """Device memory of one context: `device_memory_size_v2` since 10.1, the only one in 11."""
    # The newer name first, since 11 has lost the older one.
    size = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if size is None else size)


def create_context(package: Any, engine: Any, memory: int, size: int) -> Any:
    """An execution context in memory of ours, which several contexts may share in turn."""
    context = engine.create_execution_context(
        package.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    if context is None:
        return None
    if hasattr(context, "set_device_memory"):  # since 10.1
        context.set_device_memory(memory, size)
    else:
        context.device_memory = memory
    return context


# What each package's registry has of ours. A registry belongs to the process, takes every plugin
# once, and answers a second library, or the same again, with None (10.16, 11.4 and RTX 1.7 do).
_registered: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def load_plugin(package: Any, path: Path, sha256: str | None = None) -> None:
    """Register every creator of our library, once a process, from a private copy of it.

    Args:
        package: TensorRT's.
        path: the library.
        sha256: what was checked; None where there is nothing to hold the library against.

    Raises:
        RuntimeUnavailableError: TensorRT cannot load it, or has another one already; or it is not
            what was checked.
    """
    library = library_copy(path)
    # Of the copy's bytes, which are those that run: the file may be exchanged meanwhile.
    if sha256 not in {None, library.sha256}:
        raise RuntimeUnavailableError(
            f"library={path} was changed since it was checked, so it is not run; start again"
        )
    if _registered.get(package) == library.sha256:
        return
    registry = package.get_plugin_registry()
    if registry.get_creator(_A_PLUGIN, str(OPERATOR_VERSION), DOMAIN) is not None:
        raise RuntimeUnavailableError(
            f"library={path}: another vssm plugin library is registered in this process already "
            "(rebuilt since, LD_PRELOAD, or a program's own); start a new process without it"
        )
    if registry.load_library(library.path) is None:
        raise RuntimeUnavailableError(
            f"library={path} was refused by TensorRT {package.__version__}; rebuild it on this "
            "machine with `make setup`"
        )
    _registered[package] = library.sha256


def plugin_layers(package: Any, network: Any) -> int:
    """How many layers of a network are plugins."""
    kind = package.LayerType.PLUGIN_V3
    return sum(network.get_layer(i).type == kind for i in range(network.num_layers))


def progress_monitor(package: Any, report: Callable[[str, int, int], None]) -> Any:
    """An IProgressMonitor that calls `report(phase, step, steps)`; report must not raise."""

    # In here, as the base class comes with whichever of the two packages was loaded.
    class Monitor(package.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps
            report(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            report(name, step + 1, self._steps.get(name, 0))
            # False would cancel the build.
            return True

        def phase_finish(self, name: str) -> None:
            steps = self._steps.pop(name, 0)
            report(name, steps, steps)

    return Monitor()


def logger(package: Any) -> Any:
    """An ILogger that keeps what TensorRT complained of: its `complaints`, newest last."""

    class Logger(package.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= package.ILogger.Severity.ERROR:
                self.complaints.append(message)
                # A session may run for months.
                del self.complaints[:-20]

    return Logger()
