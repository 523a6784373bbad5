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
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import FloatArray, preprocess
from vssm.errors import VssmError
from vssm.evaluation.folders import ClassesGiven, match_folders

_AHEAD = 2  # batches a worker may be ahead of the model
_SHOWN = 4  # names in a note
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


@dataclass(frozen=True)
class ImageFolder:
    """The pictures below a folder, and which class each of its folders holds.

    Attributes:
        root: the folder.
        pictures: its files, sorted by path.
        classes: by class, the name of its folder.
        rule: how folders were matched to classes, in words.
        notes: what else is there that one should know: what was passed over, what is empty.
    """

    root: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    rule: str
    notes: tuple[str, ...]

    def places(self, pictures: Sequence[Picture]) -> list[str]:
        """Where they are; absolute, as another process may have another working directory."""
        root = self.root.absolute()
        return [str(root / picture.path) for picture in pictures]

    def fingerprint(self) -> str:
        """SHA-256 over paths, classes and sizes in bytes; a link to nothing has size -1."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            try:
                # Sizes, not contents: hashing every image would read the
                # whole set before the first run.
                size = (self.root / picture.path).stat().st_size
            except OSError:
                size = -1
            digest.update(f"{picture.path}\0{picture.target}\0{size}\n".encode())
        return digest.hexdigest()


def open_images(
    root: Path,
    num_classes: int,
    *,
    labels: Sequence[str] | None = None,
    classes: ClassesGiven = None,
    name: str = "images",
) -> ImageFolder:
    """Every file of the class folders; `match_folders` says which class each folder is.

    Folders may hold folders. Every file counts as an image, but for hidden ones.

    Args:
        root: holds a folder for each class, such as n01440764.
        num_classes: classes of the model.
        labels: its class names; None where it has none.
        classes: as for `match_folders`.
        name: what errors call the root: the option that it was given by.

    Raises:
        ValueError: there are no images, it is not certain which folder is which class, a folder
            cannot be read, or a name cannot be written down.
    """
    if not root.is_dir():
        raise ValueError(
            f"{name}={root} is not a folder; give one that holds a folder for each class"
        )
    found = _Listing(f"{name}={root}", root)
    match = match_folders(found.name, found.folders, num_classes, labels=labels, classes=classes)
    # After the match: a wrong folder is refused before thousands of files are listed.
    found.walk()
    index = {folder: i for i, folder in enumerate(match.names)}
    pictures = [Picture(path, index[path.split("/", 1)[0]]) for path in sorted(found.files)]
    if not pictures:
        raise ValueError(f"{name}={root} holds no files in its folders; give the images")
    seen = {picture.target for picture in pictures}
    empty = [match.names[i] for i in range(num_classes) if i not in seen]
    if empty:
        found.note(f"{len(empty)} of {num_classes} classes have no images", empty)
    return ImageFolder(root, tuple(pictures), match.names, match.rule, tuple(found.notes))


class _Listing:
    """The files of class folders, and notes about what else is there."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.files: list[str] = []
        self.notes: list[str] = []
        self._hidden: list[str] = []
        entries = sorted(root.iterdir())
        self.folders = [p.name for p in entries if p.is_dir() and not p.name.startswith(".")]
        self._hidden += [p.name for p in entries if p.name.startswith(".")]
        beside = {p.name for p in entries} - {*self.folders, *self._hidden}
        if beside:
            self.note("files beside the class folders are not read", sorted(beside))
        self._check_targets()

    def walk(self) -> None:
        """Find the files of all class folders."""
        inner: list[str] = []
        for name in self.folders:
            # Without onerror os.walk passes over an unreadable folder in silence.
            for folder, below, files in os.walk(
                self.root / name, followlinks=True, onerror=self._refuse_unreadable
            ):
                self._check_no_loop(folder)
                place = Path(folder).relative_to(self.root)
                inner += [place.as_posix()] if len(place.parts) > 1 else []
                hidden = [n for n in (*below, *files) if n.startswith(".")]
                self._hidden += [(place / n).as_posix() for n in hidden]
                # In place: os.walk goes down into what this very list still holds.
                below[:] = [n for n in below if not n.startswith(".")]
                self.files += [(place / n).as_posix() for n in files if not n.startswith(".")]
        for path in self.files:
            # Python reads each byte of a file name that it cannot decode as a lone surrogate.
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                raise ValueError(
                    f"{self.name} holds {path!r}, whose name is no UTF-8 and cannot be written "
                    "into results; rename it"
                )
        if inner:
            self.note("folders inside class folders count for the class", sorted(inner))
        if self._hidden:
            self.note("hidden files and folders are passed over", sorted(self._hidden))

    def note(self, text: str, names: Sequence[str]) -> None:
        """Say something about some names."""
        shown = ", ".join(names[:_SHOWN])
        more = f", ... ({len(names):,} in all)" if len(names) > _SHOWN else ""
        self.notes.append(f"{text}: {shown}{more}")

    def _check_targets(self) -> None:
        """Refuse two class folders that are links to one."""
        first: dict[Path, str] = {}
        for name in self.folders:
            other = first.setdefault((self.root / name).resolve(), name)
            if other != name:
                raise ValueError(
                    f"{self.name} holds the class folders {other!r} and {name!r}, which are one "
                    "folder by a link, so that its images would belong to two classes; remove one"
                )

    def _refuse_unreadable(self, error: OSError) -> None:
        raise ValueError(
            f"{self.name}: the folder {error.filename} cannot be read ({error.strerror}); make it "
            "readable, or move it away"
        ) from error

    def _check_no_loop(self, folder: str) -> None:
        """Refuse a link to a folder that the link itself lies in: it would be walked for ever."""
        if not os.path.islink(folder):
            return
        target = Path(folder).resolve()
        if any(parent.resolve().is_relative_to(target) for parent in Path(folder).parents):
            raise ValueError(
                f"{self.name} holds {folder}, a link to {target}, a folder that it is in; remove it"
            )


class StoredImage(Protocol):
    """An image that is a part of a file, such as a member of an archive."""

    def decoded(self, spec: Preprocessing) -> Image.Image:
        """The image in RGB; what `spec` will be done to it.

        Raises:
            ValueError: it cannot be read.
        """


def load(files: Sequence[str | StoredImage], spec: Preprocessing) -> Loaded:
    """Preprocess each file; one that cannot be read gives an error in place of an image."""
    arrays: list[FloatArray] = []
    errors: list[str | None] = []
    for file in files:
        try:
            arrays.append(preprocess(file if isinstance(file, str) else file.decoded(spec), spec))
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append(None)
    # np.concatenate refuses an empty list, and a batch may have no readable image.
    empty = np.empty((0, 3, *spec.crop), np.float32)
    return Loaded(np.concatenate([empty, *arrays]), tuple(errors))


def load_in_order(
    batches: Sequence[Sequence[str | StoredImage]], spec: Preprocessing, *, workers: int
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
                # A bound on memory: loaded images wait here if the model is the slower one.
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
            # Also where the caller stops early: nobody would take the batches that still wait.
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the parent's, and without a parent, even a killed one, there is nothing to do."""
    # A terminal sends Ctrl-C to the whole group; every worker would print a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # sys.exit() in a thread ends that thread alone, and the main one goes on waiting for work.
        os._exit(1)
