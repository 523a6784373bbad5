"""Options that several commands have, and option texts to values.

No command imports numpy, torch or ONNX Runtime at its top: `vssm --help` and a wrong option are
answered before they are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vssm.commands.tables import STDOUT, console
from vssm.files.atomic import check_writable
from vssm.models.registry import cards

if TYPE_CHECKING:  # it needs numpy
    from vssm.evaluation.scoring import RayOptions


def _json_target(path: Path | None) -> Path | None:
    """Refuse at once what could not be written at the end.

    Where the result goes to standard output, what people read goes to standard error, so that the
    output is JSON and nothing else.
    """
    # Set back too: a process, such as a test's, may run several commands.
    console.stderr = path == STDOUT
    if path is not None and path != STDOUT:
        check_writable(path)
    return path


def words(*known: str) -> dict[str, Any]:
    """What a shell completes."""
    # For completion alone: the functions check values, for callers in Python too.
    return {"autocompletion": lambda incomplete: [w for w in known if w.startswith(incomplete)]}


def _models(incomplete: str) -> list[str]:
    """The models whose names begin so; asked for by a shell alone, as packages may add some."""
    return [name for name in cards() if name.startswith(incomplete)]


Directory = Annotated[Path, typer.Argument(help="What `vssm export` wrote.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        # A callback runs while options are read, so before any work.
        callback=_json_target,
        help="Also write the result to this file; - is standard output, tables then go to stderr.",
    ),
]
_DIGITS = 18  # of an integer, so that 64 bits hold it
_OTHERS = ("ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx")
Runtime = Annotated[
    str,
    typer.Option(
        help="ort-cpu, ort-cuda, torch, tensorrt or tensorrt-rtx.", **words("torch", *_OTHERS)
    ),
]
# Where torch is what a runtime is compared with.
OtherRuntime = Annotated[
    str, typer.Option(help="ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.", **words(*_OTHERS))
]
# None, as what a runtime has by default, and whether it has a choice, differ.
Backend = Annotated[
    str | None,
    typer.Option(
        help="kernel (the default) or body; for torch kernel or reference; an engine has its own.",
        **words("kernel", "body", "reference"),
    ),
]
Labels = Annotated[Path | None, typer.Option(help="Class names, one per line or JSON.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, float16 (fp16, half) or bfloat16 (bf16).",
        **words("float32", "float16", "bfloat16"),
    ),
]
Opset = Annotated[int, typer.Option(help="18 to 20.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the export there.")]
Inline = Annotated[
    bool, typer.Option("--inline", help="Also write model.inlined.onnx, without functions.")
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of one run; by default one for each core that no worker has."),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that load images; by default none to four, by the cores."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Numbers = Annotated[
    list[str] | None,
    typer.Option("--recipe", help="KEY=VALUE of docs/finetune.md's table, repeatable."),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run an engine that is not of this machine, or was changed.")
]

# What `vssm export` and `vssm finetune` make a model from.
Name = Annotated[str, typer.Argument(help="One of `vssm models`.", autocompletion=_models)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights: a file or hf://OWNER/REPO/FILE. Default: seeded initial ones."),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the checkpoint's EMA weights.")]
Key = Annotated[
    str | None, typer.Option(help="Where the checkpoint has the weights, such as student or a.b.")
]
NewHead = Annotated[
    bool,
    typer.Option("--new-head", help="Keep the model's own head if the file's has another width."),
]
Schedule = Annotated[
    str | None,
    typer.Option(help="BLOCK:RATIO,..., such as 5:0.8,10:0.8, or default. Without it: dense."),
]
Merge = Annotated[
    str | None,
    typer.Option(
        help="Tokens of a Vim that merge after every other block, such as 5, or 5,class_token=true."
    ),
]
Alignment = Annotated[
    str | None,
    typer.Option(
        help="gap (pruning's default), constant or none (merging's default); merging: or size.",
        **words("gap", "constant", "none", "size"),
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="clip (the default), sum, l1, l2, as_released or random.",
        **words("clip", "sum", "l1", "l2", "as_released", "random"),
    ),
]
Conv = Annotated[
    str | None,
    typer.Option(help="Vim's convolution: by position (the default) or compact, over kept tokens."),
]
Restore = Annotated[
    str | None,
    typer.Option(
        help="What a dense head sees where tokens are gone: frozen (pruning's default), zero, "
        "nearest, or group (merging's default).",
        **words("frozen", "zero", "nearest", "group"),
    ),
]
DrawSeed = Annotated[int | None, typer.Option(help="Of importance random; 0 by default.")]
NumClasses = Annotated[
    int | None, typer.Option(help="Classes; 1000, or those of the model's data set, by default.")
]
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
Model = Annotated[
    str,
    typer.Argument(help="What `vssm export` wrote, or a model's name.", autocompletion=_models),
]
OwnSchedule = Annotated[
    str | None, typer.Option(help="BLOCK:RATIO,..., or default. Without it: the export's own.")
]
# None, unlike `NumClasses`: an export has a width of its own.
HeadWidth = Annotated[int | None, typer.Option(help="Classes of a named model, 1000 by default.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Option KEY=VALUE of a named model, repeatable; a wrong KEY lists them."
    ),
]
Folder = Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")]


# Scoring on a Ray cluster.
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="Score on a Ray cluster: the one that this machine is in, one started here, or this.",
        **words("auto", "local"),
    ),
]
RayActors = Annotated[
    int | None, typer.Option(help="Sessions on the cluster; as many as it holds by default.")
]
RayGpus = Annotated[float, typer.Option(help="GPUs of each session, such as 1 or 0.25.")]


def ray_options(address: str | None, actors: int | None, gpus: float) -> RayOptions | None:
    """The cluster that options describe; None for none.

    Raises:
        ValueError: there is none to which the others could belong.
    """
    if address is None:
        if actors is not None or gpus:
            raise ValueError("--ray-actors and --ray-gpus are of a cluster: say which with --ray")
        return None
    from vssm.evaluation.scoring import RayOptions

    return RayOptions(address, actors, gpus)


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
    # Not `int` alone, which takes "-1", " 3" and "1_0" too.
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}={text!r} is not sizes from 1 joined by x; write 1x3x224x224")
    return tuple(map(int, parts))


def options(pairs: list[str] | None, name: str = "--set") -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is JSON, or else a text; the last of a key counts.

    `name` is the option that has them, for errors.

    Raises:
        ValueError: a pair is malformed, or its integer has more than 18 digits.
    """
    example = "image_size=384" if name == "--set" else "seed=1"
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{name} {pair}: is not KEY=VALUE; write for example {example}")
        try:
            # So 224 is a number, true a flag and gap a text, without quotes that a shell would eat.
            found[key] = json.loads(value, parse_int=_integer)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _integer(digits: str) -> int:
    # What computes with it would overflow, or go on with it for ever.
    if len(digits) > _DIGITS:
        raise ValueError(
            f"{digits[:_DIGITS]}... is an integer of {len(digits):,} digits; give one of "
            f"{_DIGITS} at most"
        )
    return int(digits)
