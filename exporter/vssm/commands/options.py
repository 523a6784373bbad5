"""Options that several commands have, option texts to values, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from vssm.files.atomic import check_writable

_SECONDS: Final = 30.0


def _writable(path: Path | None) -> Path | None:
    """Refuse at once what could not be written at the end."""
    if path is not None:
        check_writable(path)
    return path


Directory = Annotated[Path, typer.Argument(help="What `vssm export` wrote.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_writable, help="Also write the result to this file."),
]
Runtime = Annotated[str, typer.Option(help="ort-cpu, ort-cuda, torch, tensorrt or tensorrt-rtx.")]
# Where torch is what a runtime is compared with.
OtherRuntime = Annotated[str, typer.Option(help="ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.")]
Operators = Annotated[
    str | None,
    typer.Option(
        help="kernel (the default) or body; for torch kernel or reference; an engine has its own."
    ),
]
Labels = Annotated[Path | None, typer.Option(help="Class names, one a line or JSON.")]
Inline = Annotated[
    bool, typer.Option("--inline", help="Also write model.inlined.onnx, without functions.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of one run; all cores by default.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run an engine that is not of this machine, or was changed.")
]

# What `vssm export` and `vssm finetune` make a model from.
Checkpoint = Annotated[Path | None, typer.Option(help="Weights; the seeded initial ones without.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the checkpoint's EMA weights.")]
Schedule = Annotated[
    str | None,
    typer.Option(help="BLOCK:RATIO,..., such as 5:0.8,10:0.8, or default; dense without."),
]
Alignment = Annotated[str | None, typer.Option(help="gap (the default), constant or none.")]
Importance = Annotated[
    str | None, typer.Option(help="clip (the default), sum, l1, l2, as_released or random.")
]
Conv = Annotated[
    str | None,
    typer.Option(help="Vim's convolution: compact, over kept tokens (the default), or position."),
]
NumClasses = Annotated[int, typer.Option(help="Classes of the classifier.")]
Switches = Annotated[
    list[str] | None,
    typer.Option("--set", help="Model option KEY=VALUE, repeatable; a wrong KEY lists them."),
]

# What holds the classes of images.
Images = Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|numeric|text",
        help="Which folder is which class: a file that names them in order, or the order of their "
        "names. Default: by the model's labels, else by name where that is certain.",
    ),
]

# A model by its name or as an export, for the commands that prune it in several ways.
Model = Annotated[str, typer.Argument(help="What `vssm export` wrote, or a model's name.")]
OwnSchedule = Annotated[
    str | None, typer.Option(help="BLOCK:RATIO,..., or default; without it the export's own.")
]
HeadWidth = Annotated[int | None, typer.Option(help="Classes of a named model, 1000 by default.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Option KEY=VALUE of a named model, repeatable; a wrong KEY lists them."
    ),
]
Folder = Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")]


@contextlib.contextmanager
def telling(where: Console, what: str) -> Iterator[Callable[[str], None]]:
    """A function that tells what happens: on one changing line of a terminal, else now and then.

    A log gets a line in `_SECONDS` at most: enough to see that a long run is alive.
    """
    told = time.monotonic()

    def tell(line: str) -> None:
        nonlocal told
        if where.is_terminal:
            status.update(Text(line))
        elif (now := time.monotonic()) - told >= _SECONDS:
            told = now
            where.print(Text(line), soft_wrap=True)

    with where.status(what) as status:
        yield tell


def say(where: Console, word: str, style: str, rest: str = "") -> None:
    """Print one line, its first word in a style."""
    where.print(Text.assemble((word, style), rest), soft_wrap=True)


def say_folders(where: Console, rule: str, notes: Sequence[str]) -> None:
    """Say how class folders were matched to classes, and what else is among them."""
    say(where, "classes", "bold", f": {rule}")
    for note in notes:
        say(where, "note", "yellow", f": {note}")


def integers(name: str, text: str) -> list[int]:
    """Read "1,8".

    Raises:
        ValueError: a part is no integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a list of integers; write 1,8") from None


def sizes(name: str, text: str) -> tuple[int, ...]:
    """Read "1x3x224x224".

    Raises:
        ValueError: a part is no integer from 1.
    """
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}={text!r} is not sizes from 1 joined by x; write 1x3x224x224")
    return tuple(map(int, parts))


def options(pairs: list[str], name: str = "--set") -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is JSON, or else a text; the last of a key counts.

    `name` is the option that has them, for errors.

    Raises:
        ValueError: a pair is malformed.
    """
    example = "image_size=384" if name == "--set" else "seed=1"
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{name} {pair}: is not KEY=VALUE; write for example {example}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
