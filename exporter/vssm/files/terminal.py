"""The terminal, which is shown no control character of any file, key, label or name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from vssm.files.text import shown


class Terminal(Console):
    """A console that writes every text as it is, brackets and colons too, but nothing invisible.

    Escapes take the place of control, bidirectional and invisible characters and of lone
    surrogates, before the layout where a text comes as one, and in any case before it is written.
    """

    def __init__(self, **options: Any) -> None:
        # Here "[red]" and ":tada:" are parts of a name, not orders.
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more, as behind `| head`: the work goes on, and ends as it would."""
        # rich would end here with exit code 1, which is that of a check that failed.
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # for what is still buffered
        os.close(nowhere)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with escapes, so that a column is as wide as what it shows."""
        return super().render_str(shown(text, lines=True), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What is written, whatever it was made from; rich's own movements of the cursor stay."""
        for segment in super().render(renderable, options):
            yield (
                segment
                if segment.control
                else segment._replace(text=shown(segment.text, lines=True))
            )
