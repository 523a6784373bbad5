"""What `vssm bench` compares: kernel, body and PyTorch loop of an export, and its dense twin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import torch

from vssm._version import __version__
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import BATCH, Manifest
from vssm.artifact.reference import is_module, stored_reference
from vssm.bench.kinds import Work, by_kind, count_graph
from vssm.bench.measure import (
    BenchReport,
    Contender,
    MachineRates,
    MakeInputs,
    Timing,
    check_arguments,
    machine_rates,
    measure,
    moved_rates,
    noise,
)
from vssm.errors import check_choice
from vssm.models.base import VisionModel
from vssm.models.cost import count
from vssm.onnx.export import export
from vssm.runtimes.library import library_info
from vssm.runtimes.ort import OrtCpuSession, cpu_name
from vssm.runtimes.session import Session, plural
from vssm.runtimes.torch import TorchSession, model_of
from vssm.types import Array, Steps

if TYPE_CHECKING:
    from vssm.runtimes.ort_cuda import DeviceRun, OrtCudaSession

KERNEL, BODY, LOOP, DENSE = "ort kernel", "ort body", "torch loop", "ort kernel, dense"
FLOAT = "ort kernel, float32"  # beside a quantised export
RESIDENT = "ort kernel, images on the GPU"
BENCH_RUNTIMES = ("ort-cpu", "ort-cuda")
_PROFILE_RUNS = 8


def bench(
    artifact: Artifact,
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    samples: int,
    torch_loop: bool,
    progress: Steps,
    runtime: str = "ort-cpu",
    beside: Sequence[Artifact] = (),
) -> BenchReport:
    """Everything in one run, interleaved; arguments as for `measure`, `beside` as verified exports.

    Raises:
        ValueError: an argument is none that can be measured.
        RuntimeUnavailableError: the runtime is missing.
    """
    check_arguments(batches, threads, samples)
    check_choice("runtime", runtime, BENCH_RUNTIMES)
    _check_beside(artifact, beside)
    on_cpu = runtime == "ort-cpu"
    if not on_cpu:
        _cuda(artifact, "kernel", threads[0]).close()  # what is missing is said at once
    progress("measuring the machine", 0, 1)
    # By one thread as well: the profile is one thread's.
    rates = machine_rates({1, *threads}) if on_cpu else None
    with nullcontext(_named(beside)) if beside else _twin(artifact, progress) as others:
        subjects = _subjects(artifact, others, torch_loop, _ort if on_cpu else _cuda)
        rows = measure(
            subjects,
            inputs_of(artifact),
            rates,
            batches=batches,
            threads=threads,
            samples=samples,
            progress=progress,
        )
    command = (
        f"vssm bench {artifact.directory} --batch {','.join(map(str, batches))} --threads "
        f"{','.join(map(str, threads))} --samples {samples}{'' if torch_loop else ' --no-torch'}"
        f"{'' if on_cpu else f' --runtime {runtime}'}"
        f"{''.join(f' --beside {other.directory}' for other in beside)}"
    )
    progress("profiling", 0, 1)
    operators = _profile(artifact) if on_cpu else {}
    notes = [] if rates is None else moved_rates(rates, machine_rates({1, *threads}))
    kinds = [] if rates is None else by_kind(operators, artifact.model_path, rates, notes)
    if artifact.manifest.quantization is not None:
        floats = {n for n, other in others.items() if other.manifest.precision == "float32"}
        notes += slower_than_float(rows, floats)
    return BenchReport(
        rows=rows,
        rates=rates,
        operators=operators,
        scan_over_floor=None if rates is None else _scan_over_floor(operators, rates, subjects[0]),
        kinds=kinds,
        context={**_context(artifact), "command": command},
        notes=notes,
    )


def slower_than_float(rows: Sequence[Timing], floats: Collection[str]) -> list[str]:
    """A sentence for each float32 subject, batch and threads where it is faster."""
    own = {(row.batch, row.threads): row.median_ms for row in rows if row.subject == KERNEL}
    return [
        f"slower than {row.subject} on this machine: {ms:.2f} against {row.median_ms:.2f} ms "
        f"(batch {row.batch}, {plural(row.threads, 'thread')})"
        for row in rows
        if row.subject in floats and (ms := own[row.batch, row.threads]) > row.median_ms
    ]


def inputs_of(artifact: Artifact) -> MakeInputs:
    """What makes inputs to time an export with.

    Noise for one input of images; else those that the export of a user's module keeps, over again:
    only the user knows which numbers are valid.

    Raises:
        ArtifactError: it keeps none.
    """
    if takes_images(artifact):
        return partial(noise, artifact.image_shape)
    kept, _ = stored_reference(artifact)
    open_ones = {t.name for t in artifact.manifest.inputs if t.shape[:1] == (BATCH,)}

    def again(batch: int) -> dict[str, Array]:
        return {
            name: array[np.arange(batch) % len(array)] if name in open_ones else array
            for name, array in kept.items()
        }

    return again


def takes_images(artifact: Artifact) -> bool:
    """Whether the one input is images, or feature maps, of floats."""
    first, *further = artifact.manifest.fed
    return not further and len(first.shape) == 4 and first.dtype == "float32"


def _sizes(artifact: Artifact) -> list[tuple[object, ...]]:
    """The inputs of one image, as far as exports must have the same to be compared."""
    if takes_images(artifact):
        return [artifact.image_shape]
    return [(t.name, t.dtype, *t.shape[1:]) for t in artifact.manifest.fed]


def _check_beside(artifact: Artifact, beside: Sequence[Artifact]) -> None:
    shape = _sizes(artifact)
    for other in beside:
        if _sizes(other) != shape:
            raise ValueError(
                f"beside={str(other.directory)!r} takes images of {_sizes(other)}, not "
                f"{shape}; measure exports of one image size together"
            )
    if len(_named(beside)) < len(beside):
        names = [str(other.directory) for other in beside]
        raise ValueError(f"beside={names}: two have one last part, their name in the table")


def _named(beside: Sequence[Artifact]) -> dict[str, Artifact]:
    return {f"{KERNEL}, {other.directory.resolve().name}": other for other in beside}


_Open = Callable[[Artifact, str, int], Session]


def _subjects(
    artifact: Artifact, others: Mapping[str, Artifact], torch_loop: bool, ort: _Open
) -> list[Contender]:
    def subject(
        name: str,
        open_session: Callable[[int], Session],
        same: str | None = None,
        of: Artifact = artifact,
    ) -> Contender:
        work = _work(of)
        return Contender(name, open_session, work.exps, work.macs, same, work.products)

    subjects = [
        subject(KERNEL, partial(ort, artifact, "kernel")),
        subject(BODY, partial(ort, artifact, "body"), KERNEL),
    ]
    # Outputs on the GPU have one size for all images, which detections have not.
    if ort is _cuda and not artifact.manifest.gives_boxes and len(artifact.manifest.fed) == 1:
        # What the copy of the images to the GPU costs shows only beside a session without it.
        subjects.append(subject(RESIDENT, partial(_resident, artifact), KERNEL))
    if torch_loop and not is_module(artifact):  # of a module there is no code here to run
        # Of a quantised export it is the float model, which differs by more than rounding.
        same = None if artifact.manifest.quantization is not None else KERNEL
        subjects.append(subject(LOOP, partial(_torch, artifact), same))
    # Compared with nothing: they are other models, whose logits differ by right.
    subjects += [subject(n, partial(ort, other, "kernel"), of=other) for n, other in others.items()]
    return subjects


def _work(artifact: Artifact) -> Work:
    """What `count_graph` gives; of our own models by their formulas, which need no shapes."""
    if is_module(artifact):
        return count_graph(artifact.model_path)
    cost = count(model_of(artifact))
    return Work(cost.exps, cost.gemm)


def _ort(artifact: Artifact, backend: str, threads: int) -> Session:
    return OrtCpuSession(artifact, backend=backend, threads=threads)


def _cuda(artifact: Artifact, backend: str, threads: int) -> OrtCudaSession:
    from vssm.runtimes.ort_cuda import OrtCudaSession

    return OrtCudaSession(artifact, backend=backend, threads=threads)


class _Resident(Session):
    """A session on the GPU whose images are there already; the outputs come to the host."""

    def __init__(self, inner: OrtCudaSession) -> None:
        super().__init__(inner.manifest, inner.info)
        self._inner = inner
        self._held: tuple[Array, DeviceRun] | None = None

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        images = feeds[self.manifest.inputs[0].name]
        # By identity: `measure` passes one array for all runs of a batch, and a copy
        # a run is what this session is there to leave out.
        if self._held is None or self._held[0] is not images:
            self._held = (images, self._inner.on_device(images))
        self._held[1].run()
        return self._held[1].outputs()

    def close(self) -> None:
        self._held = None
        self._inner.close()


def _resident(artifact: Artifact, threads: int) -> Session:
    return _Resident(_cuda(artifact, "kernel", threads))


def _torch(artifact: Artifact, threads: int) -> Session:
    # By name, since "auto" would run our kernels and not the loop.
    return TorchSession(artifact, backend="reference", threads=threads)


@contextmanager
def _twin(artifact: Artifact, progress: Steps) -> Iterator[dict[str, Artifact]]:
    """The same weights in a temporary directory: in float32, or without the schedule."""
    manifest = artifact.manifest
    quantized = manifest.quantization is not None
    if is_module(artifact) or (manifest.dense and not quantized):
        yield {}
        return
    twin = f"{'float32' if quantized else 'dense'} twin"
    with tempfile.TemporaryDirectory() as directory:
        model = model_of(artifact, dense=not quantized)
        yield {
            FLOAT if quantized else DENSE: export(
                model,
                Path(directory) / "twin",
                dtype=manifest.dtype,
                outputs=asked_outputs(model, manifest),
                opset=manifest.opset,
                progress=lambda phase, *rest: progress(f"{twin}: {phase}", *rest),
            )
        }


def asked_outputs(model: VisionModel, manifest: Manifest) -> str:
    """What an export of the model was asked for, by what it has."""
    names = {output.name for output in manifest.outputs}
    groups = model.output_groups.items()
    # The largest: the logits are among the outputs of an export with labels, too.
    return max((len(group), asked) for asked, group in groups if names.issuperset(group))[1]


def _profile(artifact: Artifact) -> dict[str, float]:
    batch = artifact.manifest.batch
    images = inputs_of(artifact)(1 if isinstance(batch, str) else batch)
    # A session of its own, behind the timings: profiling slows every node. One
    # thread, as the floor it is held against is one thread's.
    session = OrtCpuSession(artifact, threads=1, profile=True)
    with session:
        for _ in range(_PROFILE_RUNS):
            session.run(images)
        return session.profiled_operators()


def _scan_over_floor(
    operators: dict[str, float], rates: MachineRates, subject: Contender
) -> float | None:
    scans = sum(time for name, time in operators.items() if "SelectiveScan" in name)
    return scans / rates.scan_floor_ms(subject, 1, 1) if scans else None


def _described(artifact: Artifact) -> str:
    """The inputs of one image, in words."""
    if takes_images(artifact):
        return "x".join(map(str, artifact.image_shape)) + " float32"
    tensors = artifact.manifest.fed
    return ", ".join(f"{t.name} {'x'.join(map(str, t.shape))} {t.dtype}" for t in tensors)


def _context(artifact: Artifact) -> dict[str, str]:
    manifest, library = artifact.manifest, library_info()
    return {
        "model": f"{manifest.name} {manifest.precision} {manifest.tokens}",
        "weights": manifest.weights,
        "images": f"{_described(artifact)}, after 2 runs to warm up",
        "cpu": cpu_name(),
        "kernels": f"{library.path.name} {library.version}, {library.cpu_isa}",
        "vssm": __version__,
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
    }
