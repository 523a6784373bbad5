"""Where a training run is: weights, averages and the optimiser's state in one safetensors file.

One file, renamed into place, so that a kill at any moment leaves the state of one step whole. No
state of random generators is in it: every draw is a function of the seed and its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vssm.checkpoints.formats import parse_safetensors
from vssm.checkpoints.load import state_digest
from vssm.checkpoints.torch_file import MALFORMED
from vssm.errors import ArtifactError
from vssm.files.atomic import atomic_path
from vssm.files.regular import WEIGHTS, read_regular
from vssm.models.base import VisionModel
from vssm.training.recipe import Recipe
from vssm.training.scene_recipe import SceneRecipe

_FORMAT = "vssm-finetune-3"
_KINDS = ("model", "ema", "optimizer")


@dataclass
class State:
    """What changes from step to step.

    Attributes:
        model: being trained.
        optimizer: its AdamW.
        ema: averaged weights by the model's keys.
        step: steps done since the beginning.
    """

    model: VisionModel
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor]
    step: int = 0

    @classmethod
    def begin(cls, model: VisionModel, recipe: Recipe | SceneRecipe) -> State:
        """Before the first step."""
        optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.lr)
        return cls(model, optimizer, {k: v.clone() for k, v in model.state_dict().items()})

    def advance(self, lr: float, decay: float) -> None:
        """Make a step with the gradients that are there, and average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for key, value in self.model.state_dict().items():
            # Counters and tables of indices have no average.
            if value.is_floating_point():
                self.ema[key].mul_(decay).add_(value, alpha=1 - decay)
            else:
                self.ema[key].copy_(value)
        self.step += 1

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Write it to `path`, whole or not at all; equal states give equal bytes.

        Raises:
            ArtifactError: the file cannot be written.
        """
        kinds = (self.model.state_dict(), self.ema, self._moments())
        tensors = {
            f"{kind}.{key}": value.detach().cpu().contiguous()
            for kind, values in zip(_KINDS, kinds, strict=True)
            for key, value in values.items()
        }
        document = {"format": _FORMAT, "step": self.step, "header": dict(header)}
        document["sha256"] = _digest(document, tensors)
        with atomic_path(path) as temporary:
            # Not save_file, whose own unfinished files a kill would leave under unknown names.
            # One entry: safetensors writes several in another order in every process.
            metadata = {"vssm": json.dumps(document, sort_keys=True)}
            temporary.write_bytes(safetensors.torch.save(tensors, metadata=metadata))

    def load(self, path: Path, header: Mapping[str, Any]) -> None:
        """Go back to where `save` was.

        Raises:
            ArtifactError: the file is damaged, or of another run.
        """
        try:
            tensors, metadata = parse_safetensors(read_regular(path, limit=WEIGHTS))
            document = json.loads(metadata["vssm"])
            # First: another run's tensors would not fit, which must not be told as damage.
            _check_header(path, document, header)
            if document.pop("sha256") != _digest(document, tensors):
                raise ValueError("its bytes are not those that were written")
            self._fill(tensors)
            self.step = int(document["step"])
        except (safetensors.SafetensorError, *MALFORMED) as error:
            raise ArtifactError(
                f"state={path} is damaged ({error}); begin anew in another directory"
            ) from error

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter and name; nothing before the first step."""
        return {
            f"{key}.{name}": value
            for key, parameter in self.model.named_parameters()
            for name, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for key, value in tensors.items():
            # The first dot ends the kind; keys of the model have dots of their own.
            kind, _, name = key.partition(".")
            by_kind[kind][name] = value
        self.model.load_state_dict(by_kind["model"])
        for key, average in self.ema.items():
            average.copy_(by_kind["ema"].pop(key))
        parameters = dict(self.model.named_parameters())
        for key, value in by_kind["optimizer"].items():
            name, _, part = key.rpartition(".")
            parameter = parameters[name]
            # The count of steps stays on the CPU, where AdamW wants it.
            device = "cpu" if part == "step" else parameter.device
            self.optimizer.state[parameter][part] = value.to(device)


def _digest(document: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that a state is; safetensors itself checks sizes alone."""
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(f"{text}\n{state_digest(tensors)}".encode()).hexdigest()


def _check_header(path: Path, document: Mapping[str, object], header: Mapping[str, Any]) -> None:
    found = document["header"]
    if document["format"] != _FORMAT or not isinstance(found, dict):
        raise ValueError(f"format={document['format']!r} is not {_FORMAT}")
    for key in sorted({*found, *header}):
        if found.get(key) != header.get(key):
            raise ArtifactError(
                f"state={path} is of another run: {key}={found.get(key)}, now {header.get(key)}; "
                "give the arguments that it was begun with, or name another directory"
            )


def _groups(model: VisionModel, recipe: Recipe | SceneRecipe) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, embeddings and the scan's A and D do not.

    A segmenter's blocks may learn more slowly the further they are from the head.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # VMamba's and GroupMamba's stacks have no module: x_proj_weight, dt_projs_weight.
        matrix = parameter.dim() >= 2 and name.endswith("weight")
        groups.setdefault((matrix, recipe.scale(name, model.traced_blocks)), []).append(parameter)
    return [
        {"params": some, "weight_decay": recipe.weight_decay if matrix else 0.0, "scale": scale}
        for (matrix, scale), some in sorted(groups.items(), key=itemgetter(0), reverse=True)
    ]
