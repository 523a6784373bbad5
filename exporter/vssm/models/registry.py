"""The families and their models: those of this package, of installed ones, and registered ones."""

from __future__ import annotations

import functools
import os
import re
import types
from collections.abc import Collection, Mapping
from typing import Any, Final, Union, get_args, get_origin

from vssm.artifact.manifest import MAX_CROP
from vssm.errors import VssmError, did_you_mean
from vssm.models.catalogue import FAMILIES
from vssm.models.family import ModelCard, ModelFamily

ENTRY_POINTS: Final = "vssm.families"
_LARGEST: Final = 1 << 24  # of a size; a model of less does not fit into any memory

_families: Final[dict[str, ModelFamily]] = {family.name: family for family in FAMILIES}


def register_family(family: ModelFamily) -> None:
    """Add a family of models to those that every function and command takes.

    A package does the same for the command `vssm` with an entry point of the group
    `vssm.families` that names a `ModelFamily`. The same family again changes nothing.

    Raises:
        TypeError: it is no ModelFamily.
        ValueError: a name is not of small letters, digits and _, or another family has it.
    """
    if not isinstance(family, ModelFamily):
        raise TypeError(f"family={family!r} is not a family; give a vssm.ModelFamily")
    if _families.get(family.name) == family:
        return
    taken = {model: other.name for other in _families.values() for model in other.cards}
    if family.name in _families:
        raise ValueError(f"name={family.name!r} is another family already; give yours another name")
    for model in family.cards:
        if not re.fullmatch(r"[a-z0-9_]+", model):
            raise ValueError(
                f"cards={model!r} is not of small letters, digits and _; name it as my_model_tiny"
            )
        if model in taken:
            raise ValueError(
                f"cards={model!r} is a model of the family {taken[model]!r}; give another name"
            )
    _families[family.name] = family


def families() -> Mapping[str, ModelFamily]:
    """Every family by its name.

    Raises:
        VssmError: an installed package's family cannot be used.
    """
    _installed()
    return _families


@functools.cache  # once a process; what raises is asked again
def _installed() -> None:
    from importlib.metadata import entry_points  # takes a while; `vssm --help` does without

    for found in entry_points(group=ENTRY_POINTS):
        try:
            register_family(found.load())
        except Exception as error:  # whatever a stranger's module raises
            package = "a package" if found.dist is None else found.dist.name
            raise VssmError(
                f"entry point {found.name} = {found.value!r} of {package}, group {ENTRY_POINTS}: "
                f"{type(error).__name__}: {error}; mend that package, or uninstall it"
            ) from error


def cards() -> dict[str, ModelCard]:
    """Every model by its name.

    Raises:
        VssmError: an installed package's family cannot be used.
    """
    return {name: card for family in families().values() for name, card in family.cards.items()}


def family_of(name: str) -> ModelFamily:
    """The family of a model.

    Raises:
        ValueError: there is no model of this name.
    """
    check_name(name)
    return next(family for family in families().values() if name in family.cards)


def magnifies(name: str) -> float:
    """How much more a model magnifies rounding than Vim; 1 where nothing is known of it.

    Args:
        name: a model's name, or that of a module's class.
    """
    # The official class GroupMamba is of our family groupmamba.
    known = next((f for f in families().values() if name in f.cards), None)
    known = known or families().get(name.lower())
    return 1.0 if known is None else known.magnifies


# What the official code, timm and Hugging Face call our options, in the order to try.
_FOREIGN: Final[dict[str, tuple[str, ...]]] = {
    "img_size": ("image_size",),
    "input_size": ("image_size",),
    "embed_dim": ("d_model", "widths"),
    "embed_dims": ("widths", "d_model"),
    "dims": ("d_model", "widths"),
    "hidden_size": ("d_model", "widths"),
    "hidden_sizes": ("widths", "d_model"),
    "num_layers": ("depth", "depths"),
    "num_hidden_layers": ("depth", "depths"),
    "depth": ("depths",),
    "depths": ("depth",),
    "state_size": ("d_state",),
    "ssm_d_state": ("d_state",),
    "ssm_ratio": ("expand",),
    "ssm_dt_rank": ("dt_rank",),
    "time_step_rank": ("dt_rank",),
    "conv_kernel": ("d_conv", "conv_size"),
    "num_labels": ("num_classes",),
    "bimamba_type": ("bimamba",),
    "if_divide_out": ("divide_out",),
    "if_rope": ("rope",),
    "if_cls_token": ("class_token",),
    "use_middle_cls_token": ("class_token",),
    "final_pool_type": ("pool",),
    "global_pool": ("pool",),
    "init_layer_scale": ("layer_scale",),
    "stem_hidden_dim": ("stem_width",),
}
_LOAD: Final = (
    "no weights come with this package; leave it out and load the official file with "
    "vssm.load_checkpoint(model, FILE), or --checkpoint FILE on the command line"
)
_DTYPE: Final = (
    "a model is made in float32; leave it out and give the dtype to vssm.export, or --dtype"
)
# Habits that no option of ours stands for.
_ANSWERS: Final[dict[str, str]] = {
    "pretrained": _LOAD,
    "checkpoint_path": _LOAD,
    "pretrained_cfg": _LOAD,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "in_chans": "images have 3 channels; leave it out",
    "in_channels": "images have 3 channels; leave it out",
    "num_channels": "images have 3 channels; leave it out",
    "drop_rate": "the models drop nothing out; leave it out",
    "drop_path_rate": "the models drop no path; leave it out",
    "device": "a model is made on the CPU; leave it out and call model.to(device)",
}


def check_name(name: str) -> ModelCard:
    """The card of a model.

    Raises:
        ValueError: there is none of this name; the message names the closest.
    """
    if name in (known := cards()):
        return known[name]
    if official := _contained(name):
        raise ValueError(
            f"name={name!r} is not a model here; did you mean {official!r}? What else an official "
            "name says is an option: vssm.create_model(name, image_size=...), or --set KEY=VALUE"
        )
    if os.sep in name:
        raise ValueError(
            f"name={name!r} is a path, but this takes the name of a model (`vssm models` lists "
            "them); give a file of weights, such as the weights.safetensors of an export, as "
            "--checkpoint FILE"
        )
    raise ValueError(
        f"name={name!r} is not a model{did_you_mean(name, known)} (`vssm models` lists them; "
        "vssm.register_family adds a family of your own)"
    )


def check_task(name: str, task: str | Collection[str], what: str) -> None:
    """Refuse a model of another task than a command is for.

    Args:
        name: a model's name; one that is unknown here passes, as exports of other modules have.
        task: the one that is needed, or those of which one is.
        what: what the command does, to complete "... is for".

    Raises:
        ValueError: the model has another task.
    """
    card, tasks = cards().get(name), (task,) if isinstance(task, str) else task
    if card is not None and card.task not in tasks:
        raise ValueError(
            f"model={name!r} is for {card.task}, and {what} is for {' and '.join(tasks)}; choose "
            "a model of that task (`vssm models` lists them)"
        )


def _contained(name: str) -> str | None:
    """The longest of our names whose parts are all in an official one, whatever is between.

    So are vim_small_patch16_stride8_224_bimambav2_... and hustvl/Vim-tiny-midclstok read.
    """
    parts = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = [known for known in cards() if parts.issuperset(known.split("_"))]
    # The longest, because vim_small is contained in every name that contains vim_small_stride8.
    return max(found, key=len, default=None)


def check_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model, an `image_size` such as "224x320" as (224, 320).

    Raises:
        ValueError: the model has no such option; the message says what it is called here. Or a
            number is not finite, or larger than that of any model.
        TypeError: a value is of another type than its option.
    """
    allowed = family_of(name).fields()
    options = dict(given)
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(f"{key}={value!r}: {_unknown(name, key, allowed)}")
    if isinstance(size := options.get("image_size"), str):
        options["image_size"] = _image_size(size)
    for key, value in options.items():
        _check_type(key, value, allowed[key])
    return options


def _unknown(name: str, key: str, allowed: Mapping[str, Any]) -> str:
    if key in _ANSWERS:
        return _ANSWERS[key]
    # The same foreign name is another option in another family, so the family's own list decides.
    ours = next((known for known in _FOREIGN.get(key, ()) if known in allowed), None)
    hint = did_you_mean(key, allowed) if ours is None else f"; it is called {ours!r} here"
    return f"{name} has no such option{hint or '; its options are ' + ', '.join(allowed)}"


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"image_size={text!r} is not height x width; write 224x320, or 224")
    return int(sides[0]), int(sides[1])


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a text for a number, or for true or false: any text counts as true."""
    parts = get_args(hint) if get_origin(hint) in {types.UnionType, Union} else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in parts)
    if not all(isinstance(kind, type) for kind in kinds):
        return  # Any, Literal, ...: the configuration's own check says more
    # JSON has lists only, and people write 2 where 2.0 is meant.
    kinds += ((list,) if tuple in kinds else ()) + ((int,) if float in kinds else ())
    # bool is a subclass of int: without the second half True would pass as a depth of 1.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{key}={value!r} is not of type {names}; give one (true, 16, [32, 48])")
    numbers = value if isinstance(value, list | tuple) else [value]
    inner = {kind for part in parts for kind in get_args(part) or (part,)}
    if any(isinstance(number, float) for number in numbers) and float not in inner:
        raise TypeError(f"{key}={value!r} holds a fraction; give whole numbers")
    most = MAX_CROP if key == "image_size" else _LARGEST
    # NaN is not at most anything. What is far too large would be built for minutes, and then fail.
    if not all(abs(n) <= most for n in numbers if isinstance(n, int | float)):
        raise ValueError(f"{key}={value!r} is not a number up to {most:,}; give one that is")
