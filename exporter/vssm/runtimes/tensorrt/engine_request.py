"""What `vssm engine` is asked for, and what of it contradicts itself; nothing heavy is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vssm.runtimes.tensorrt import api


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        operators: "kernel" (plugin layers) or "body" (the file's fallback functions); None for
            what the runtime can do best.
        batch: (min, opt, max) of the optimisation profile.
        memory_mib: workspace limit in MiB; None for TensorRT's own, the whole GPU.
        level: builder optimisation level 0 to 5; None for TensorRT's own, 3.
        timing_cache: file that keeps measured timings; None for one named after version and GPU.
        plugins_inside: put the plugin library into the engine.
        version_compatible: let later versions of TensorRT run the engine.
        hardware_compatible: "ampere-plus" or "same-compute-capability"; None for this GPU alone.
        compute_capabilities: for tensorrt-rtx, the GPUs to compile for; empty for its own choice.
    """

    runtime: str = "tensorrt"
    operators: str | None = None
    batch: tuple[int, int, int] = (1, 8, 32)
    memory_mib: int | None = None
    level: int | None = None
    timing_cache: Path | None = None
    plugins_inside: bool = False
    version_compatible: bool = False
    hardware_compatible: str | None = None
    compute_capabilities: tuple[str, ...] = ()

    @property
    def product(self) -> api.Product:
        """The product of `runtime`."""
        return api.PRODUCTS[self.runtime]

    @property
    def uses_plugins(self) -> bool:
        """Whether our operators become plugin layers."""
        return (self.operators or ("kernel" if self.product.plugins else "body")) == "kernel"


def check_request(request: EngineRequest) -> None:
    """Refuse what cannot be built, before anything is loaded.

    Raises:
        ValueError: a value is out of its range, or two contradict.
    """
    if request.runtime not in api.PRODUCTS:
        raise ValueError(
            f"runtime={request.runtime!r} builds no engines; choose from {', '.join(api.PRODUCTS)}"
        )
    if request.operators not in {None, "kernel", "body"}:
        raise ValueError(f"operators={request.operators!r} is not kernel or body; choose one")
    check_batch(request.batch)
    if request.memory_mib is not None and request.memory_mib < 1:
        raise ValueError(f"memory_mib={request.memory_mib} is below 1; give MiB of GPU memory")
    if request.level is not None and not 0 <= request.level <= 5:
        raise ValueError(f"level={request.level} is outside [0, 5]; 3 is TensorRT's own")
    _check_product(request)
    if request.plugins_inside and not request.uses_plugins:
        raise ValueError("plugins_inside=True with operators='body', which has no plugin; drop one")
    _check_capabilities(request.compute_capabilities)


def check_batch(batch: tuple[int, int, int]) -> None:
    """Refuse an impossible (min, opt, max).

    Raises:
        ValueError: the three do not grow from 1 or more.
    """
    low, opt, high = batch
    if not 1 <= low <= opt <= high:
        raise ValueError(
            f"batch={low},{opt},{high} must grow from 1 or more; give MIN,OPT,MAX, such as 1,8,32"
        )


def _check_capabilities(wanted: tuple[str, ...]) -> None:
    """A session compares them with what the GPU calls itself."""
    for capability in wanted:
        if not re.fullmatch(r"\d+\.\d", capability) or wanted.count(capability) > 1:
            raise ValueError(
                f"compute_capability={capability!r} is no capability, or is there twice; give each "
                "once, such as 8.6,8.9"
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
    if request.operators == "kernel" and not request.product.plugins:
        raise ValueError(
            f"operators='kernel' with runtime='{request.runtime}': {name} runs no plugin layers; "
            "leave it out (the fallback bodies run), or build with full TensorRT"
        )
    for option, value in (rtx_only if request.product.plugins else full_only).items():
        if value:
            raise ValueError(f"{option}={value!r} is no option of {name}; leave it out")
