"""What a user's module is called with, as tensors by name: the inputs of its file."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from vssm.errors import UnsupportedError
from vssm.files.json import is_name

# One tensor, a tuple of what stands in forward's parentheses, or a mapping of its keywords.
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

_TYPES: Final = (torch.float32, torch.int64, torch.int32, torch.bool)
_REMEDY: Final = (
    "give every input by the parameter that it is for: example_input={'image': ..., 'mask': ...} "
    "(--input image=1x3x64x64 --input mask=1x1x64x64)"
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call of a module, by their names in the file.

    A name is the parameter of `forward`, and below it the keys of a mapping or the places in a
    list, joined by dots: `image`, `views.0`, `sample.mask`. One tensor that was given by itself is
    called `images` or `input`, whatever the parameter is called.

    Attributes:
        tensors: in the order of forward's parameters.
        several: whether they are handed on by parameter; else one stands in the first place.
        batched: names of those whose first axis is the batch.
        tuples: names of the sequences that are tuples; the others are lists.
    """

    tensors: dict[str, Tensor]
    several: bool
    batched: frozenset[str]
    tuples: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Inputs:
        """The inputs of an example; those of an example that is such inputs already.

        The batch is the first size of the first of them that has an axis; all whose first size is
        the same have it in their first axis.

        Raises:
            TypeError: the example is neither a tensor nor a tuple or a mapping of some.
            ValueError: a key cannot be a part of a name.
            UnsupportedError: the module's `forward` does not take these arguments.
        """
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Tensor):
            _refuse_misfit(model, (example,), {})
            tensors, several = {_plain_name(example): example}, False
            tuples: set[str] = set()
        elif isinstance(example, tuple | Mapping) and example:
            tensors, several, tuples = {}, True, set()
            for name, value in _by_parameter(model, example).items():
                _collect(name, value, tensors, tuples)
        else:
            raise TypeError(
                f"example_input={type(example).__name__} is no tensor, and no tuple or mapping of "
                f"tensors; {_REMEDY}"
            )
        for name, tensor in tensors.items():
            if tensor.dtype not in _TYPES:
                raise TypeError(
                    f"example_input: {name} is {tensor.dtype}; inputs of a file are float32, "
                    "int64, int32 or bool"
                )
        return cls(tensors, several, _batched(tensors), frozenset(tuples))

    @classmethod
    def again(cls, arrays: Mapping[str, Any], config: Mapping[str, Any]) -> Inputs:
        """The inputs of a file that was made from others like them.

        Args:
            arrays: NumPy arrays by name.
            config: of its model.json, from `config`.
        """
        # A copy: torch takes no negative strides, as of a BGR view, and warns of read-only arrays.
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        several, tuples = isinstance(config.get("example_input"), dict), config.get("tuples", ())
        return cls(tensors, several, _batched(tensors), frozenset(tuples))

    @property
    def config(self) -> dict[str, Any]:
        """What `again` has to know, for model.json."""
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if not self.several:
            return {"example_input": next(iter(shapes.values()))}
        return {"example_input": shapes, "tuples": sorted(self.tuples)}

    def call(self, model: nn.Module) -> Any:
        """What the module returns for them."""
        if not self.several:
            return model(*self.tensors.values())
        signature = inspect.signature(model.forward)
        given = nested(self.tensors, self.tuples)
        arguments: OrderedDict[str, Any] = OrderedDict()
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = given  # what no other parameter took
            elif name in given:
                arguments[name] = given.pop(name)
        bound = inspect.BoundArguments(signature, arguments)
        return model(*bound.args, **bound.kwargs)

    def map(self, change: Callable[[Tensor], Tensor], *, batched: bool = False) -> Inputs:
        """The same with every tensor changed, or with `batched` those with the batch."""
        changed = {
            name: change(tensor) if not batched or name in self.batched else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=changed)

    @property
    def rows(self) -> int:
        """The size of the batch; 1 where no input has one."""
        return next((len(self.tensors[name]) for name in self.tensors if name in self.batched), 1)

    @property
    def only(self) -> Tensor:
        """The one tensor of a module that takes no more."""
        (tensor,) = self.tensors.values()
        return tensor

    def __str__(self) -> str:
        texts = {name: f"{tuple(x.shape)}, {x.dtype}" for name, x in self.tensors.items()}
        if not self.several:
            return f"an input of shape {next(iter(texts.values()))}"
        return "inputs " + "; ".join(f"{name} of shape {text}" for name, text in texts.items())


def nested(values: Mapping[str, Any], tuples: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Values by their names as the arguments that the names tell of, by parameter.

    Args:
        values: by names such as `image`, `views.0`, `sample.mask`.
        tuples: names of the sequences that are to be tuples; the others become lists.

    Raises:
        ValueError: a name is another's beginning, or the places of a sequence are not 0, 1, ...
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *above, last = name.split(".")
        inner: Any = tree
        for part in above:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise ValueError(f"input {name!r}: another input has this name, or a part of it")
        inner[last] = value
    return {name: _sequences(name, value, tuples) for name, value in tree.items()}


def _sequences(name: str, value: Any, tuples: frozenset[str]) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _sequences(f"{name}.{key}", entry, tuples) for key, entry in value.items()}
    if not any(key.isdecimal() for key in inner):
        return inner
    if sorted(inner, key=lambda key: (len(key), key)) != [str(i) for i in range(len(inner))]:
        raise ValueError(
            f"input {name!r} has {', '.join(inner)} in it; the places of a list are 0, 1, ..."
        )
    entries = [inner[str(i)] for i in range(len(inner))]
    return tuple(entries) if name in tuples else entries


def _by_parameter(model: nn.Module, example: tuple[Any, ...] | Mapping[str, Any]) -> dict[str, Any]:
    """What each parameter of the module's forward gets, in their order."""
    if isinstance(example, tuple):
        bound = _refuse_misfit(model, example, {})
    else:
        bound = _refuse_misfit(model, (), example)
    if bound is None:
        raise UnsupportedError(
            f"{type(model).__name__}.forward does not say what its parameters are; wrap the module "
            "in one whose forward does"
        )
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        further = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found.update(value if further else {name: value})
    return found


def _refuse_misfit(
    model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> inspect.BoundArguments | None:
    """The arguments by parameter; None where the module does not say what its parameters are."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        return None
    try:
        return signature.bind(*args, **keywords)
    except TypeError as error:
        raise UnsupportedError(
            f"{type(model).__name__}.forward{signature} cannot be called with this example_input: "
            f"{error}; {_REMEDY}"
        ) from error


def _collect(name: str, value: Any, tensors: dict[str, Tensor], tuples: set[str]) -> None:
    """Put the tensors below a value into `tensors`."""
    if isinstance(value, Tensor):
        if not is_name(name):
            raise ValueError(
                f"example_input: {name!r} is not up to 128 letters, digits and the signs _ . : / -;"
                " an input of a file needs such a name"
            )
        tensors[name] = value
        return
    if isinstance(value, Mapping | list | tuple) and not value:
        raise ValueError(f"example_input: {name} is empty; give its tensors, or leave it out")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str) or "." in key or key.isdecimal():
                raise ValueError(
                    f"example_input: the key {key!r} of {name} is not a text without dots that is "
                    "more than a number; wrap the module in one that renames it"
                )
            _collect(f"{name}.{key}", entry, tensors, tuples)
        return
    if type(value) not in {list, tuple}:
        raise TypeError(
            f"example_input: {name} is {type(value).__name__}, and only tensors, or lists, tuples "
            "and mappings of them, can be inputs of a file; leave it out for its default, or wrap "
            "the module in one that fixes it"
        )
    if isinstance(value, tuple):
        tuples.add(name)
    for place, entry in enumerate(value):
        _collect(f"{name}.{place}", entry, tensors, tuples)


def _plain_name(example: Tensor) -> str:
    # As a model of this package calls its input, so that image files can be run.
    is_images = example.dim() == 4 and example.shape[1] == 3 and example.is_floating_point()
    return "images" if is_images else "input"


def _batched(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    sizes = {name: len(tensor) for name, tensor in tensors.items() if tensor.dim()}
    batch = next(iter(sizes.values()), None)
    return frozenset(name for name, size in sizes.items() if size == batch)
