"""An ImageNet-layout folder as a list of pictures, loaded in order by worker processes."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import FloatArray, preprocess, read_labels
from vssm.errors import VssmError

_AHEAD = 2  # batches a worker may be ahead of the model
_MAX_WORKERS = 4  # by default: more than a model on a few cores can use
_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Picture:
    """One file: its path below the root, with slashes, and the class of its folder."""

    path: str
    target: int


@dataclass(frozen=True)
class Loaded:
    """One batch: the images that could be read, and of every file its error, None where none."""

    images: FloatArray
    errors: tuple[str | None, ...]


def worker_count(workers: int | None) -> int:
    """How many processes load images: as many as asked for, else one a core up to four.

    Raises:
        ValueError: the number is below 0.
    """
    if workers is None:
        return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    if workers < 0:
        raise ValueError(f"workers={workers} is below 0; 0 loads images in this process")
    return workers


def open_pictures(
    root: Path, num_classes: int, classes: Path | None, *, name: str = "images"
) -> list[Picture]:
    """`find_pictures`, the folder of each class named in a file where there is one.

    Args:
        root: holds a folder for each class.
        num_classes: classes of the model.
        classes: the file, as `read_labels` takes it; None: sorted by name.
        name: what errors call the root: the option that it was given by.

    Raises:
        ValueError: as `find_pictures` and `read_labels` do.
    """
    names = None if classes is None else read_labels(classes, num_classes, name="classes")
    return find_pictures(root, num_classes, names, name=name)


def find_pictures(
    root: Path, num_classes: int, classes: Sequence[str] | None = None, *, name: str = "images"
) -> list[Picture]:
    """Every file of the class folders, sorted by its path.

    Class i is the folder that `classes` names there, else the folder that is i-th by name, as in
    ImageNet. Folders may hold folders. Every file counts as an image, but for hidden ones.

    Args:
        root: holds a folder for each class, such as n01440764.
        num_classes: classes of the model.
        classes: the folder of each class.
        name: what errors call the root.

    Raises:
        ValueError: there are no images, the folders are not the model's classes, or a name cannot
            be written down.
    """
    if not root.is_dir():
        raise ValueError(f"{name}={root} is no folder; give one that holds a folder for each class")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    _check_distinct(classes or ())
    if classes is None and len(folders) != num_classes:
        raise ValueError(
            f"{name}={root} holds {len(folders)} folders, but the model has {num_classes} classes; "
            "give one for each, or name the folder of every class in a file with --classes"
        )
    index = {folder: i for i, folder in enumerate(folders if classes is None else classes)}
    if unknown := sorted(set(folders) - set(index)):
        raise ValueError(
            f"{name}={root} holds the folder {unknown[0]!r}, which is no class of the file; name "
            "all folders there, or move it away"
        )
    pictures = [Picture(path, index[path.split("/", 1)[0]]) for path in _files(root, folders)]
    if not pictures:
        raise ValueError(f"{name}={root} holds no files in its folders; give the images")
    return pictures


def fingerprint(root: Path, pictures: Sequence[Picture]) -> str:
    """SHA-256 over paths, classes and sizes in bytes; a link to nothing has size -1."""
    digest = hashlib.sha256()
    for picture in pictures:
        try:
            size = (root / picture.path).stat().st_size
        except OSError:
            size = -1
        digest.update(f"{picture.path}\0{picture.target}\0{size}\n".encode())
    return digest.hexdigest()


def load(files: Sequence[str], spec: Preprocessing) -> Loaded:
    """Preprocess each file; one that cannot be read gives an error in place of an image."""
    arrays: list[FloatArray] = []
    errors: list[str | None] = []
    for file in files:
        try:
            arrays.append(preprocess(file, spec))
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append(None)
    empty = np.empty((0, 3, *spec.crop), np.float32)
    return Loaded(np.concatenate([empty, *arrays]), tuple(errors))


def load_in_order(
    batches: Sequence[Sequence[str]], spec: Preprocessing, *, workers: int
) -> Iterator[Loaded]:
    """Each batch of files, loaded by `workers` processes; by this one where that is 0.

    Raises:
        VssmError: a worker was killed, as the system does when memory runs out.
    """
    return in_order(functools.partial(load, spec=spec), batches, workers=workers)


def in_order(
    work: Callable[[_Batch], _Result], batches: Iterable[_Batch], *, workers: int
) -> Iterator[_Result]:
    """`work` of each batch, done ahead by `workers` processes; by this one where that is 0.

    Raises:
        VssmError: a worker was killed, as the system does when memory runs out.
    """
    if workers == 0:
        yield from map(work, batches)
        return
    # Not forked: the runtime's threads, and whatever they hold, are not there in a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise VssmError(
                f"workers={workers}: one was killed, perhaps for lack of memory; run again with "
                "fewer workers or a smaller batch, which goes on where this ended"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_distinct(classes: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for i, name in enumerate(classes):
        if first.setdefault(name, i) != i:
            raise ValueError(
                f"classes: the folder {name!r} is named for the classes {first[name]} and {i}; "
                "name a folder of its own for each"
            )


def _files(root: Path, folders: Sequence[str]) -> list[str]:
    found = []
    for name in folders:
        for folder, inner, files in os.walk(root / name, followlinks=True):
            _check_no_loop(root, folder)
            inner[:] = [n for n in inner if not n.startswith(".")]
            place = Path(folder).relative_to(root)
            found += [(place / file).as_posix() for file in files if not file.startswith(".")]
    for path in found:
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise ValueError(
                f"images={root} holds {path!r}, whose name is no UTF-8 and cannot be written into "
                "results; rename it"
            )
    return sorted(found)


def _check_no_loop(root: Path, folder: str) -> None:
    """Refuse a link to a folder that the link itself lies in: it would be walked for ever."""
    if not os.path.islink(folder):
        return
    target = Path(folder).resolve()
    if any(parent.resolve().is_relative_to(target) for parent in Path(folder).parents):
        raise ValueError(
            f"images={root} holds {folder}, a link to {target}, a folder that it is in; remove it"
        )


def _begin_worker() -> None:
    """Ctrl-C is the parent's, and without a parent, even a killed one, there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
