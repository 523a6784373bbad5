"""A classifier's result for each picture: from logits, and as rows of a block's table and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from vssm.evaluation.classify import class_probabilities
from vssm.evaluation.data import Loaded, Picture
from vssm.evaluation.journal import ImageResult
from vssm.runtimes.session import Session, run_any
from vssm.types import Array

TOP: Final = 5


@dataclass(frozen=True)
class ClassRows:
    """Rows of a block of pictures, which lie in a folder for each class.

    Attributes:
        classes: by class, the name of its folder.
    """

    classes: tuple[str, ...]

    def schema(self) -> Any:
        """The fields of `ImageResult` behind the path of the picture."""
        import pyarrow

        return pyarrow.schema(
            [
                ("image", pyarrow.string()),
                ("top", pyarrow.list_(pyarrow.int32())),
                ("best", pyarrow.float64()),
                ("target", pyarrow.float64()),
                ("error", pyarrow.string()),
            ]
        )

    def table(self, session: Session, names: Sequence[str], loaded: Loaded) -> Any:
        """The rows of one batch.

        Raises:
            ValueError: logits are not finite.
        """
        import pyarrow

        index = {folder: i for i, folder in enumerate(self.classes)}
        pictures = [Picture(name, index[name.split("/", 1)[0]]) for name in names]
        found = image_results(session, pictures, loaded)
        rows = [{"image": name, **asdict(row)} for name, row in zip(names, found, strict=True)]
        return pyarrow.Table.from_pylist(rows, schema=self.schema())


def results_of(table: Any) -> Iterator[ImageResult]:
    """What `ClassRows.table` was made of."""
    for row in table.drop_columns("image").to_pylist():
        yield ImageResult(**{**row, "top": tuple(row["top"])})


def image_results(
    session: Session, pictures: Sequence[Picture], loaded: Loaded
) -> Iterator[ImageResult]:
    """A row for each picture; what cannot be read takes no part in the run."""
    scores = iter(run_any(session, loaded.images)["logits"] if len(loaded.images) else ())
    for picture, error in zip(pictures, loaded.errors, strict=True):
        yield ImageResult(error=error) if error is not None else _row(picture, next(scores))


def _row(picture: Picture, logits: Array) -> ImageResult:
    shares = class_probabilities(logits, picture.path)
    # By logits, not by shares, which may round to 0 for several classes. Stable:
    # the lower class comes first, as argmax has it.
    top = np.argsort(-logits, kind="stable")[:TOP]
    return ImageResult(tuple(map(int, top)), float(shares[top[0]]), float(shares[picture.target]))
