"""`vssm finetune` as a function: a model's name, a folder of images, trained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vssm.errors import ArtifactError
from vssm.files.atomic import make_directory, sha256_of
from vssm.files.json_files import write_json
from vssm.training.request import FinetuneRequest

if TYPE_CHECKING:  # torch comes with the first model
    from vssm.training.loop import Run, Trained
    from vssm.training.state import State

WEIGHTS_FILE: Final = "finetuned.safetensors"
EMA_FILE: Final = "finetuned_ema.safetensors"
REPORT_FILE: Final = "finetune.json"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneReport:
    """What a training run left.

    Attributes:
        weights: file of the trained weights, under the model's official keys.
        sha256: of that file, as model.json names it once they are exported.
        ema: file of the averaged weights.
        ema_sha256: of that file.
        trained: steps, loss and speed.
        run: what was trained from what on what: model, schedule, data, recipe, versions.
        tensorboard: whether a TensorBoard log was written; the package is optional.
    """

    weights: str
    sha256: str
    ema: str
    ema_sha256: str
    trained: Trained
    run: Mapping[str, str]
    tensorboard: bool


def finetune(
    request: FinetuneRequest, *, progress: Progress = lambda _: None
) -> FinetuneReport | None:
    """Train a model, pruned or dense, on a folder that holds one folder of images a class.

    Under torchrun every process calls this with the same arguments. A run that was stopped, by
    kill -9 too, ends with the same weights and log once it is called again with `resume`.

    Args:
        request: what to do.
        progress: called with a line of text after every step.

    Returns:
        The report, which is also written as finetune.json; None in processes that do not lead.

    Raises:
        ValueError, VssmError: a file, a number or the model does not fit; the message says which.
    """
    from vssm.training.finetune_parallel import Group
    from vssm.training.finetune_setup import build_models, plan_run
    from vssm.training.log import RunLog, has_tensorboard, remove_leftovers
    from vssm.training.loop import LOG_FILE, train

    group = Group(request.work.device)
    if group.leads:
        _check_output(request)
    model, teacher = build_models(request, group)
    run = plan_run(request, model, group)
    if group.leads:
        make_directory(request.output)
    log = RunLog(request.output / LOG_FILE) if group.leads else None
    with log or nullcontext(), group:
        if group.leads:
            remove_leftovers(request.output)
        state, trained = train(model, run, group, log=log, teacher=teacher, progress=progress)
        if not group.leads:
            return None
        return _write(state, trained, run, request.output, tensorboard=has_tensorboard())


def has_run(output: Path) -> bool:
    """Whether a training run was begun in `output`; its log is the first file that it makes."""
    from vssm.training.loop import LOG_FILE, STATE_FILE

    return (output / STATE_FILE).exists() or (output / LOG_FILE).exists()


def _check_output(request: FinetuneRequest) -> None:
    """A run that is there goes on only if asked to, and one that is not there cannot."""
    from vssm.training.loop import STATE_FILE

    if not request.resume and (request.output / STATE_FILE).exists():
        raise ArtifactError(
            f"output={request.output} holds a training run; go on with it by --resume, or name "
            "another directory"
        )
    if request.resume and not has_run(request.output):
        raise ArtifactError(
            f"output={request.output} holds no training run to go on with; name the directory of "
            "the run, or leave --resume out to begin one"
        )


def _write(
    state: State, trained: Trained, run: Run, directory: Path, *, tensorboard: bool
) -> FinetuneReport:
    """The weights under official keys, and the report beside them."""
    from vssm.checkpoints.load import save_safetensors

    weights, ema = directory / WEIGHTS_FILE, directory / EMA_FILE
    save_safetensors(state.model.state_dict(), weights)
    save_safetensors(state.ema, ema)
    report = FinetuneReport(
        weights=str(weights),
        sha256=sha256_of(weights),
        ema=str(ema),
        ema_sha256=sha256_of(ema),
        trained=trained,
        run=run.header,
        tensorboard=tensorboard,
    )
    write_json(directory / REPORT_FILE, report)
    return report
