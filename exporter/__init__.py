"""vssm: prune vision state-space models, export them to ONNX, run them with native kernels.

Importing this package needs numpy alone; torch, onnx and onnxruntime come with their first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from exporter._version import __version__

_PUBLIC = {
    "AblationOptions": "exporter.pipeline_ablate_options",
    "AblationTraining": "exporter.pipeline_ablate_options",
    "FinetuneRequest": "exporter.training.request",
    "ForwardDetails": "exporter.models",
    "PruneSchedule": "exporter.schedule",
    "Recipe": "exporter.training.recipe",
    "Session": "exporter.runtimes.session",
    "Subject": "exporter.training.request",
    "Work": "exporter.training.request",
    "ablate": "exporter.pipeline_ablate",
    "bench_directory": "exporter.pipeline_bench",
    "check_parity": "exporter.pipeline",
    "create_model": "exporter.models",
    "default_schedule": "exporter.models.schedules",
    "evaluate": "exporter.pipeline_evaluate",
    "export": "exporter.onnx_export",
    "export_module": "exporter.compat.module_export",
    "finetune": "exporter.pipeline_finetune",
    "list_models": "exporter.models",
    "load_checkpoint": "exporter.checkpoint",
    "open_session": "exporter.pipeline",
    "preprocess": "exporter.preprocessing",
    "prune": "exporter.compat.prune",
    "visualize": "exporter.pipeline_visualize",
}
_PACKAGES = {"compat": "exporter.compat"}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(_PACKAGES[name])
    if name not in _PUBLIC:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
