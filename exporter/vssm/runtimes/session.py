"""What every session is: arrays in, arrays out, and a statement of what ran."""

from __future__ import annotations

import abc
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from vssm.artifact.manifest import BATCH, SIZES, Manifest, TensorInfo, rules_of
from vssm.errors import RuntimeUnavailableError, check_least, check_most
from vssm.types import Array

BACKENDS = ("kernel", "body")
TORCH_BACKENDS = ("kernel", "reference")
CLOSED = "session=closed: open another one to run again"
# A bound for slips of the keyboard: a runtime starts as many threads as it is told, and hangs.
_MAX_THREADS = 1024
_MAX_WORKERS = 4  # by default: more than a model on a few cores can use
# Far above the error of any dtype: two programs that should be one model, or a broken kernel.
_SAME = 0.2


def plural(count: int, noun: str) -> str:
    """The count and the noun, as in "2 threads"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def compare_outputs(got: Array, want: Array) -> tuple[float, bool]:
    """Their difference over the largest value wanted, and whether both can be of one model."""
    largest = float(np.abs(want).max()) or 1.0  # a detector may find nothing
    difference = float(np.abs(got - want).max()) / largest
    return difference, difference <= _SAME  # NaN is not


@dataclass(frozen=True)
class RuntimeInfo:
    """What a session runs, for every report.

    Attributes:
        runtime: "torch", "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx".
        backend: what computes the custom operators: "kernel" (this package's library), "body"
            (the fallback functions in the file) or "reference" (PyTorch).
        version: the runtime's version.
        device: the device in words.
        threads: threads of one run.
        library: file name of the operator library, None without it.
        library_version: its version.
        isa: the instruction set its kernels chose, or the GPU's compute capability; None in
            PyTorch, whose library does not say.
        trusted: why an engine would have been refused, had the caller not trusted it.
    """

    runtime: str
    backend: str
    version: str
    device: str
    threads: int
    library: str | None = None
    library_version: str | None = None
    isa: str | None = None
    trusted: str | None = None

    def __str__(self) -> str:
        text = f"{self.runtime} {self.version}, backend: {self.backend}"
        if self.library is not None:
            isa = "" if self.isa is None else f", {self.isa}"
            text += f" ({self.library} {self.library_version}{isa})"
        text = f"{text}, {plural(self.threads, 'thread')}, {self.device}"
        return text if self.trusted is None else f"{text}, trusted although {self.trusted}"


def checked_threads(threads: int | None) -> int:
    """Threads of one run; None gives as many as `default_threads`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is outside [1, 1024]; a runtime starts what it is told, and hangs.
    """
    if threads is None:
        return default_threads()
    # True is an int, and would be one thread.
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads={threads!r} is not an integer; give the number of threads")
    if not 1 <= threads <= _MAX_THREADS:
        raise ValueError(
            f"threads={threads} is outside [1, {_MAX_THREADS}]; give the number of threads of one "
            "run, at best that of the cores"
        )
    return threads


def usable_cores() -> int:
    """Cores that this process may use, a container's share of them included."""
    # os.cpu_count() counts the machine's cores, not those that this process may use.
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or "max", which limits nothing
        return cores


def default_threads() -> int:
    """A thread a usable core, or fewer where OMP_NUM_THREADS says so."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cores(), int(said)) if said.isdecimal() and int(said) else usable_cores()


def share_cores(threads: int | None, workers: int | None, *, processes: int = 1) -> tuple[int, int]:
    """Threads of a run and processes that load images: together as many as there are cores.

    What is given stays as it is, and the other one gets what that leaves. Where neither is given,
    no process loads images on fewer than four cores, where another process takes from the model
    what it gives, and its start besides; from there on every second core past the first two does,
    up to four.

    Args:
        threads: of a run; None for what the workers leave.
        workers: processes that load images; None for what the threads leave.
        processes: of this kind on the machine, which share its cores.

    Raises:
        TypeError: `threads` is no integer.
        ValueError: `threads` is outside [1, 1024], or `workers` outside [0, 1024].
    """
    given = None if threads is None else checked_threads(threads)
    check_least(0, workers=workers)  # 0 loads images in this process
    check_most(_MAX_THREADS, workers=workers)
    cores = max(1, usable_cores() // processes)
    if workers is None:
        # Measured on two busy cores: 40.5 and 51.5 images/s without workers, 35.7 and 51.7 with
        # two.
        workers = min(_MAX_WORKERS, max(0, (cores - 2) // 2), max(0, cores - (given or 1)))
    return given or max(1, min(cores - workers, default_threads())), workers


def by_name(manifest: Manifest, images: Array | Mapping[str, Array]) -> Mapping[str, Array]:
    """What `Session.run` takes, by name: an array is the one input.

    Raises:
        TypeError: an array, and there are several inputs.
    """
    if isinstance(images, Mapping):
        return images
    names = [spec.name for spec in manifest.fed]
    if len(names) > 1:
        raise TypeError(
            f"images={type(images).__name__}: the export of {manifest.name} has the inputs "
            f"{', '.join(names)}; give a mapping of these names to arrays"
        )
    return {names[0]: images}


def run_any(session: Session, images: Array) -> dict[str, Array]:
    """The outputs for any number of images, whatever batches the session takes.

    A session of a fixed batch, or an engine, runs more in parts, and fewer filled up with copies of
    the last image, whose outputs are dropped: what is said of one image does not depend on others.

    Args:
        session: of a model with one input.
        images: (count, ...), as for `Session.run`; one image at least.

    Returns:
        By name, the outputs that have an entry for each image.

    Raises:
        TypeError, ValueError: as `Session.run`.
    """
    least, most = session.batches
    found: list[dict[str, Array]] = []
    for start in range(0, len(images), min(most, len(images))):
        part = images[start : start + most]
        copies = np.repeat(part[-1:], max(0, least - len(part)), axis=0)
        batch = np.concatenate([part, copies]) if len(copies) else part
        outputs = session.run(batch).items()
        found.append({k: v[: len(part)] for k, v in outputs if v.shape[:1] == (len(batch),)})
    if len(found) == 1:
        return found[0]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


class Session(abc.ABC):
    """A model that runs. Use it as a context manager, or call `close`.

    `run` may be called from several threads at once, unless a subclass says otherwise.
    """

    def __init__(self, manifest: Manifest, info: RuntimeInfo) -> None:
        self.manifest = manifest
        self.info = info
        self._process = os.getpid()

    def run(
        self, images: Array | Mapping[str, Array], *, sizes: Array | None = None
    ) -> dict[str, Array]:
        """Outputs by name: `logits` (batch, classes) float32, `kept_positions_0` ... int64.

        Args:
            images: (batch, 3, height, width) float32, preprocessed; of a module of the user's what
                it takes, and of several inputs all of them by name.
            sizes: of a detector that gives boxes, (1, 2) int64: height and width of the image
                before it was padded; None if it was not.

        Raises:
            TypeError: images is no float32 array, or one where there are several inputs.
            ValueError: its shape is not the model's, an input is missing, or the sizes do not fit.
            RuntimeUnavailableError: this process is a fork of the one that opened the session, and
                the session has threads there.
        """
        # They are not there in a fork: a run would wait for them without end.
        if self.info.threads > 1 and self._process != os.getpid():
            raise RuntimeUnavailableError(
                f"session: it was opened with {self.info.threads} threads in process "
                f"{self._process}, of which this one is a fork without them; open one in this "
                "process, or with threads=1 before the fork"
            )
        feeds = self._feeds(images)
        if sizes is not None:
            feeds[SIZES] = self._checked_sizes(sizes)
        return self._run(feeds)

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and largest batch that it takes; engines and whole detectors have bounds."""
        batch = self.manifest.batch
        return (1, sys.maxsize) if isinstance(batch, str) else (batch, batch)

    @abc.abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name, which are checked."""

    def _feeds(self, images: Array | Mapping[str, Array]) -> dict[str, Array]:
        """What `run` was given by name, checked."""
        given, specs = by_name(self.manifest, images), {s.name: s for s in self.manifest.fed}
        if given.keys() != specs.keys():
            raise ValueError(
                f"images has {', '.join(sorted(given))}, but the inputs of the export of "
                f"{self.manifest.name} are {', '.join(specs)}; give each of these"
            )
        feeds = {name: self._checked(given[name], spec) for name, spec in specs.items()}
        batches = {n: len(feeds[n]) for n, spec in specs.items() if spec.shape[:1] == (BATCH,)}
        if len(set(batches.values())) > 1:
            raise ValueError(
                f"images: {', '.join(f'{name} has {n}' for name, n in batches.items())} in its "
                "first axis, which is one batch; give each input as many"
            )
        return feeds

    def _checked_sizes(self, sizes: Array) -> Array:
        if self.manifest.fed == self.manifest.inputs:
            raise ValueError(
                f"sizes={np.asarray(sizes).tolist()}: the export of {self.manifest.name} has no "
                "such input, only detectors exported with --outputs boxes have; leave it out"
            )
        *_, height, width = self.manifest.inputs[0].shape
        found = np.asarray(sizes)
        fits = found.shape == (1, 2) and found.dtype.kind in "iu"
        if not fits or not (1 <= found[0, 0] <= int(height) and 1 <= found[0, 1] <= int(width)):
            raise ValueError(
                f"sizes={found.tolist()} is not [[height, width]] of an image in {height} x "
                f"{width}; give its size before it was padded, in whole pixels"
            )
        return found.astype(np.int64)

    def _checked(self, images: Array, spec: TensorInfo) -> Array:
        # No cast: an array of bytes or doubles was most likely never preprocessed.
        if not isinstance(images, np.ndarray) or str(images.dtype) != spec.dtype:
            kind = f"{type(images).__name__} of {getattr(images, 'dtype', 'no dtype')}"
            raise TypeError(
                f"{spec.name}={kind} is no NumPy array of {spec.dtype}; use vssm.preprocess "
                "for images, or .astype"
            )
        fits = spec.takes(images.shape, self.manifest.sizes)
        first = images.shape[:1]
        other = spec.shape[:1] not in {(BATCH,), first}
        if fits and other and len(self.manifest.fed) == 1:
            raise ValueError(
                f"{spec.name}.shape={images.shape} is not {spec.shape}: the export takes "
                f"{spec.shape[0]} at a time; give as many, or export it with a batch of any size"
            )
        if not fits or 0 in first or other:
            rules = rules_of(self.manifest.sizes)
            raise ValueError(
                f"{spec.name}.shape={images.shape} is not {spec.shape}{rules}; resize the images, "
                "or export the model with this image_size"
            )
        return images

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards."""

    def __reduce__(self) -> NoReturn:
        """A session holds a runtime of this process."""
        # pybind11 would only say that it cannot pickle an InferenceSession, and not what to do.
        raise TypeError(
            "session: it holds a runtime of this process and cannot be pickled or copied; pass the "
            "export's directory on, and call vssm.open_session in each process"
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
