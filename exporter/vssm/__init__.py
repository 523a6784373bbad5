"""vssm: prune vision state-space models, export them to ONNX, run them with native kernels.

Importing this package needs numpy alone; torch, onnx and onnxruntime come with their first use.
Where torch is not there yet, its threads will sleep while they wait for one another and not spin,
unless OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from vssm._version import __version__
from vssm.extras import explain_missing

# OpenMP reads it once, when torch is loaded. A thread that spins while it waits for others takes
# the core that they need to go on, where anything else runs beside.
if "torch" not in sys.modules and not os.environ.keys() & {
    *("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
}:
    os.environ["OMP_WAIT_POLICY"] = "passive"

_PUBLIC = {
    "AblationOptions": "vssm.studies.plan",
    "AblationTraining": "vssm.studies.plan",
    "CompareOptions": "vssm.studies.compare",
    "FinetuneRequest": "vssm.training.request",
    "ForwardDetails": "vssm.models.base",
    "ModelCard": "vssm.models.family",
    "ModelFamily": "vssm.models.family",
    "PruneSchedule": "vssm.pruning.schedule",
    "RayOptions": "vssm.evaluation.scoring",
    "Recipe": "vssm.training.recipe",
    "SceneRecipe": "vssm.training.scene_recipe",
    "Session": "vssm.runtimes.session",
    "MergeSchedule": "vssm.pruning.schedule",
    "QuantizeRequest": "vssm.quantization.request",
    "ModelSource": "vssm.training.request",
    "Resources": "vssm.training.request",
    "ablate": "vssm.studies.ablate",
    "bench_directory": "vssm.bench.run",
    "check_parity": "vssm.parity.check",
    "compare": "vssm.studies.compare",
    "create_model": "vssm.models",
    "default_schedule": "vssm.models.schedules",
    "evaluate": "vssm.evaluation.evaluate",
    "export": "vssm.onnx.export",
    "export_module": "vssm.compat.export",
    "finetune": "vssm.training.run",
    "list_models": "vssm.models",
    "load_checkpoint": "vssm.checkpoints.load",
    "open_session": "vssm.runtimes.open",
    "predict": "vssm.evaluation.predict",
    "preprocess": "vssm.artifact.preprocessing",
    "prune": "vssm.compat.prune",
    "quantize": "vssm.quantization.quantize",
    "record_backends": "vssm.ops.record",
    "register_family": "vssm.models.registry",
    "segment": "vssm.evaluation.segment",
    "visualize": "vssm.studies.visualize",
}
_PACKAGES = {"compat": "vssm.compat"}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC and name not in _PACKAGES:
        raise AttributeError(f"module 'vssm' has no attribute {name!r}")
    with explain_missing("quantize" if name == "quantize" else None):
        if name in _PACKAGES:
            return importlib.import_module(_PACKAGES[name])
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
