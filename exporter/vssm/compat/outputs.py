"""What a user's module returns, as tensors by name: the file's outputs keep the user's names."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from vssm.artifact.manifest import LOGITS
from vssm.compat.inputs import Example, Inputs
from vssm.compat.prune import PrunedModule
from vssm.errors import UnsupportedError, check_several
from vssm.files.json import is_name

# Inputs of the file, and what a pruned module adds.
_TAKEN: Final = re.compile(r"input|images|(kept_positions|scores)_\d+")
_REMEDY: Final = (
    "say outputs=[...] (--outputs): a name for each in order, or NEW=NAME for the ones to keep; "
    "what is to be classified by is called logits"
)
Outputs = Callable[[nn.Module, Example | Inputs], dict[str, Tensor]]


def module_outputs(asked: Sequence[str] | None = None, *, scores: bool = False) -> Outputs:
    """A function from a module and its inputs to the outputs by name, in order.

    One tensor is `logits`. Several have the names that a mapping, dataclass or named tuple gives
    them, `logits` first; where none of them is called so, or a plain tuple gives no names, `asked`
    says what they are.

    Args:
        asked: names to keep, in order; NEW=NAME renames one, and of a plain tuple NAME is the
            index. Names that are all new are those of all outputs, in the module's order. None: as
            above.
        scores: also a pruned module's scores, which are no outputs of the file.

    Raises:
        TypeError: `asked` is one text.
        ValueError: a name is no name, or given twice.
    """
    pairs = None if asked is None else _read(asked)

    def outputs(model: nn.Module, x: Example | Inputs) -> dict[str, Tensor]:
        inputs = Inputs.of(model, x)
        if isinstance(model, PrunedModule):
            return _pruned_outputs(model, inputs.only, asked, scores)
        found = _Found.of(inputs.call(model))
        return found.default() if pairs is None else found.chosen(pairs)

    return outputs


def _read(asked: Sequence[str]) -> list[tuple[str, str]]:
    """(new, name) of each; the same where it is not renamed."""
    check_several(outputs=asked)
    pairs = []
    for text in asked:
        new, equals, name = text.partition("=")
        pairs.append((new, name if equals else new))
    _check_names([new for new, _ in pairs])
    return pairs


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"outputs=[] names nothing; {_REMEDY}")
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"outputs={list(names)}: {name!r} is there twice; name each once")
        if not is_name(name) or _TAKEN.fullmatch(name):
            reason = (
                "is a name of the file itself"
                if is_name(name)
                else "is not up to 128 letters, digits and the signs _ . : / -"
            )
            raise ValueError(f"outputs: {name!r} {reason}; rename it by outputs=['NEW=...']")


@dataclasses.dataclass(frozen=True)
class _Found:
    """The leaves of what a module returned, by the names that lead to them; None is left out."""

    kind: str
    leaves: dict[str, Any]
    named: bool  # whether the user's code gives the names, not their place in a tuple

    @classmethod
    def of(cls, value: Any) -> _Found:
        # `return (logits,)` is as certain as `return logits`.
        while isinstance(value, list | tuple) and len(value) == 1 and not _fields(value):
            value = value[0]
        leaves: dict[str, Any] = {}
        _collect(value, "", leaves)
        named = not isinstance(value, Tensor) and (
            isinstance(value, Mapping) or _fields(value) is not None
        )
        return cls(type(value).__name__, leaves, named)

    def default(self) -> dict[str, Tensor]:
        """Outputs where nothing was asked for."""
        if len(self.leaves) == 1 and not self.named:
            return self._tensors({LOGITS: next(iter(self.leaves))})
        # No guess by order: that took `aux_logits`, which came first, for the logits, and the check
        # passed, because it made the same guess.
        if not self.named or LOGITS not in self.leaves:
            raise UnsupportedError(
                f"the module returns {self}, of which it is not certain what is what; {_REMEDY}"
            )
        _check_names(list(self.leaves))
        others = [name for name in self.leaves if name != LOGITS]
        return self._tensors({name: name for name in (LOGITS, *others)})

    def chosen(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Outputs that were asked for as (new, name)."""
        unknown = [name for _, name in pairs if name not in self.leaves]
        if not unknown:
            return self._tensors(dict(pairs))
        # Names for all outputs only where every one is new: among known ones a new one is a slip.
        whole = len(unknown) == len(pairs) == len(self.leaves)
        if whole and all(new == name for new, name in pairs):
            new_names = (new for new, _ in pairs)
            return self._tensors(dict(zip(new_names, self.leaves, strict=True)))
        raise ValueError(
            f"outputs={[new if new == name else f'{new}={name}' for new, name in pairs]}: the "
            f"module returns {self}, in which there is no {unknown[0]!r}; {_REMEDY}"
        )

    def _tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        for name in names.values():
            value = self.leaves[name]
            if isinstance(value, Tensor):
                continue
            where = f" as {name!r}" if name else ""
            # An output class of the user's own: name its tensors, which a wrapper can return.
            holds = [key for key, entry in _attributes(value).items() if isinstance(entry, Tensor)]
            inside = f", which has the tensors {', '.join(holds)}" if holds else ""
            raise UnsupportedError(
                f"the module returns {type(value).__name__}, not tensors{where}{inside}; wrap it "
                "in a module whose forward returns the logits, or a dict of tensors by name"
            )
        return {new: self.leaves[name] for new, name in names.items()}

    def __str__(self) -> str:
        parts = [
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            for name, value in self.leaves.items()
        ]
        return f"{self.kind} of {len(parts)}: {', '.join(parts)}"


def _collect(value: Any, name: str, leaves: dict[str, Any]) -> None:
    """Put the leaves below a value into `leaves`: a.b for entry b of entry a, a.0 in a tuple."""
    while name and isinstance(value, list | tuple) and len(value) == 1 and not _fields(value):
        value = value[0]
    # What was not asked for, such as a loss: model code returns None in its place.
    if value is None:
        return
    fields = None if isinstance(value, Tensor) else _fields(value)
    if isinstance(value, list | tuple) and fields is None:
        fields = {str(i): entry for i, entry in enumerate(value)}
    for key, entry in (fields or {}).items():
        _collect(entry, f"{name}.{key}" if name else key, leaves)
    if fields is not None:
        return
    # "a.b" can be a key of its own, and the way to entry b of entry a.
    if name in leaves:
        raise UnsupportedError(
            f"the module returns two values that are called {name!r}; wrap it in a module that "
            "gives them names of their own"
        )
    leaves[name] = value


def _fields(value: Any) -> dict[str, Any] | None:
    """Entries of a mapping, dataclass or named tuple by name; None for anything else."""
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _attributes(value: Any) -> Mapping[str, Any]:
    return vars(value) if hasattr(value, "__dict__") else {}


def _pruned_outputs(
    model: PrunedModule, x: Tensor, asked: Sequence[str] | None, scores: bool
) -> dict[str, Tensor]:
    details = model.forward_details(x)
    found = {LOGITS: details.logits}
    # Sessions and checks find a pruned file's stages by these names, so nobody renames them.
    found |= {f"kept_positions_{i}": kept for i, kept in enumerate(details.kept_positions)}
    if asked is not None and list(asked) != list(found):
        raise ValueError(f"outputs={list(asked)}: a pruned module has {list(found)}; leave it out")
    return found | (
        {f"scores_{i}": score for i, score in enumerate(details.scores)} if scores else {}
    )
