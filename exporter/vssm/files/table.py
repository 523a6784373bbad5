"""CSV that every reader takes: UTF-8, one row a line, cells quoted where they must be."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def table_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A header and rows as the bytes of a CSV file."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    # Python before 3.13 leaves a lone "\r" unquoted, which readers take for the end of a row.
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(columns)
    for row in rows:
        (quoted if any("\r" in str(cell) for cell in row) else plain).writerow(row)
    return text.getvalue().encode()
