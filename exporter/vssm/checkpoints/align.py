"""A file's keys to a model's: what wrappers left in them is taken off where one way fits exactly.

Each way of renaming that is tried is a `_Change`; what it comes to with this model, a `_Fit`. One
that fits in every key and shape is the answer, and says what was done; none, or two that differ, is
an error that names what was seen and the one option that helps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from vssm.checkpoints.locate import some
from vssm.checkpoints.wrapped import WRAPPER_PARTS, explain_keys
from vssm.errors import CheckpointError, VssmError

BACKBONE: Final = "backbone."
_EMA: Final = "ema_"  # mmcv's hook copies every parameter under such a name
# Counters that stand among the weights: AveragedModel's, thop's, and what loops save beside them.
_COUNTERS: Final = frozenset({"n_averaged", "total_ops", "total_params"})
_LOOP_COUNTERS: Final = frozenset({"epoch", "step", "global_step", "iteration", "iter"})
# GroupMamba's and DeiT's too; a segmenter's classifiers of pixels.
_HEADS: Final = frozenset({"head", "dist_head", "head_dist", "conv_seg"})
_DEPTH: Final = 4
_GROUPS: Final = 8
# A file with more tensors than this is not tried: a teacher, averages and mmcv's copies are four.
_MOST_TIMES: Final = 10
_MOST_MORE: Final = 100

Shapes = Mapping[str, Tensor]


class Fitted(Protocol):
    """A model, or a part of one, that a file's tensors are to fit.

    It may have `adapt_state_dict(state) -> state`, which renames old keys and resizes tables, and
    `ignores(key) -> bool`, which says of a key of the file that nothing here has a use for it.
    """

    def state_dict(self) -> Any:
        """Its tensors by their keys."""


@dataclass(frozen=True)
class _Target:
    """What keys must come to, and what the model says of others."""

    expected: Shapes
    adapt: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    ignores: Callable[[str], bool]

    @classmethod
    def of(cls, model: Fitted) -> _Target:
        adapt, ignores = (getattr(model, n, None) for n in ("adapt_state_dict", "ignores"))
        return cls(model.state_dict(), adapt or dict, ignores or (lambda _: False))


@dataclass(frozen=True)
class Aligned:
    """A state dict under the model's keys.

    Attributes:
        state: tensors by the model's keys, all of them but those of a new head.
        prefix_stripped: what was taken off the front of keys.
        prefix_added: what was put in front of keys.
        unwrapped: wrappers' parts that were taken out of the middle of keys.
        ignored: keys of the file that are no weights of the model.
        adapted: keys that the model itself renamed or resized.
        new_head: what the model's head keeps of its own, and why, in words.
    """

    state: dict[str, Tensor]
    prefix_stripped: str
    prefix_added: str
    unwrapped: tuple[str, ...]
    ignored: tuple[str, ...]
    adapted: tuple[str, ...]
    new_head: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """Parts of wrappers out of every key, then prefixes off, then one put on where it helps."""

    parts: frozenset[str] = frozenset()
    prefix: str = ""
    partial: str = ""  # off those keys that have it
    added: bool = False

    def apply(self, bare: str, expected: Shapes) -> str:
        """The new key of one that is without the parts already."""
        new = bare.removeprefix(self.prefix).removeprefix(self.partial)
        # Only where that names a key of the model: the head lies outside the backbone.
        longer = self.added and new not in expected and BACKBONE + new in expected
        return BACKBONE + new if longer else new


@dataclass(frozen=True)
class _Fit:
    change: _Change
    origin: dict[str, str]  # the file's key of each new one
    before: dict[str, Tensor]
    after: dict[str, Tensor]  # as the model adapted them
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    ignored: tuple[str, ...]
    error: Exception | None = None
    head: tuple[str, ...] = ()  # keys of the head that may be missing or misshapen

    @property
    def exact(self) -> bool:
        others = {*self.missing, *self.misshapen} - set(self.head)
        return not (others or self.unexpected or self.error)

    @property
    def matching(self) -> int:
        return len(self.after) - len(self.unexpected) - len(self.misshapen)


def align(state: Shapes, model: Fitted, *, new_head: bool = False) -> Aligned:
    """Find the one way in which the file's keys are the model's.

    Args:
        state: tensors by the file's keys.
        model: is asked to adapt them where it can (`adapt_state_dict`); left as it is.
        new_head: leave out the file's classifier, of another width, and keep the model's own.

    Raises:
        CheckpointError: there is no such way, or more than one. The message does not name the file.
    """
    target = _Target.of(model)
    expected = target.expected
    if len(state) > _MOST_TIMES * len(expected) + _MOST_MORE:  # before any of them is renamed
        raise CheckpointError(
            f"it has {len(state):,} tensors, the model {len(expected):,} ({some(state, len(state))}"
            "); name the model's part of the file with key=... (--key)"
        )
    fits: list[_Fit] = []
    # Keys as they are come first: what needs no change is the plainest way.
    for parts in dict.fromkeys((frozenset[str](), _foreign_parts(expected))):
        bare = {key: _without(parts, key) for key in state}
        for change in _changes(parts, bare.values()):
            origin = {change.apply(new, expected): key for key, new in bare.items()}
            if len(origin) == len(state):  # else two keys came to one
                fits.append(_try(state, change, origin, target))
    if new_head:
        fits = [replace(fit, head=_other_head(fit, expected)) for fit in fits]
    exact = [fit for fit in fits if fit.exact]
    # Several changes may lead to the same keys for the same tensors, which is one way, not two.
    if len({tuple(sorted((k, fit.origin.get(k, "")) for k in fit.before)) for fit in exact}) > 1:
        ways = sorted({_prefixes(fit, state)[0] for fit in exact})
        raise CheckpointError(
            f"it fits the model in several ways (prefixes {some(ways, len(ways))}); save one "
            "model's state_dict()"
        )
    if not exact:
        raise CheckpointError(_cause(state, target) or _misfit(state, expected, fits))
    if new_head and not exact[0].head:
        raise CheckpointError("new_head=True, but its head has the model's width; leave it out")
    return _aligned(exact[0], state, expected)


def _changes(parts: frozenset[str], keys: Iterable[str]) -> Iterator[_Change]:
    """The ways to try, the plainest first: 25 at most, whatever the keys without parts are."""
    keys = [key for key in keys if key.rpartition(".")[2] not in _COUNTERS | _LOOP_COUNTERS]
    lead = _common(keys)
    # Five prefixes at most, each with five ways.
    for depth in range(len(lead) + 1):
        prefix = "".join(f"{part}." for part in lead[:depth])
        yield _Change(parts, prefix)
        yield _Change(parts, prefix, added=True)
        firsts = Counter(key.removeprefix(prefix).partition(".")[0] for key in keys)
        for first, count in firsts.most_common(3):
            if 3 * count >= len(keys):
                yield _Change(parts, prefix, partial=f"{first}.")


def _foreign_parts(expected: Shapes) -> frozenset[str]:
    """Parts of wrappers that are none of the model's own."""
    return WRAPPER_PARTS - {part for key in expected for part in key.split(".")}


def _common(keys: Iterable[str]) -> list[str]:
    """What all keys begin with, the last part of each aside."""
    lead: list[str] = []
    # Not strict: behind the end of the shortest key nothing is common.
    for level in zip(*(key.split(".")[:-1][:_DEPTH] for key in keys), strict=False):
        if len(set(level)) > 1:
            break
        lead.append(level[0])
    return lead


def _without(parts: frozenset[str], key: str) -> str:
    # `or key`: one of wrappers' names alone stays, else several would become the empty key.
    return ".".join(part for part in key.split(".") if part not in parts) or key


def _try(state: Shapes, change: _Change, origin: dict[str, str], target: _Target) -> _Fit:
    expected = target.expected
    before: dict[str, Tensor] = {}
    ignored = []
    for new, key in origin.items():
        known = target.ignores(new) or _is_no_weight(new, state[key])
        if new not in expected and known:
            ignored.append(key)
        else:
            before[new] = state[key]
    error = None
    try:
        # The model's own method may change the mapping that it is given, so it gets a copy.
        after = dict(target.adapt(dict(before)))
    except (ValueError, TypeError, LookupError, RuntimeError, VssmError) as caught:
        after, error = before, caught
    return _Fit(
        change,
        origin,
        before,
        after,
        missing=[key for key in expected if key not in after],
        unexpected=[key for key in after if key not in expected],
        misshapen=[k for k, v in expected.items() if k in after and after[k].shape != v.shape],
        ignored=tuple(sorted(ignored)),
        error=error,
    )


def _is_no_weight(key: str, value: Tensor) -> bool:
    # One number: a weight that happens to be called so has more.
    counts = key.rpartition(".")[2] in _COUNTERS or key in _LOOP_COUNTERS
    return key.startswith(_EMA) or (counts and value.numel() == 1)


def _other_head(fit: _Fit, expected: Shapes) -> tuple[str, ...]:
    """Keys of a head that the file has in another width, or not at all."""
    return tuple(
        key
        for key in (*fit.missing, *fit.misshapen)
        if not _HEADS.isdisjoint(key.split("."))
        # Of another input width it would be another model, not another head.
        and (key not in fit.after or fit.after[key].shape[1:] == expected[key].shape[1:])
    )


def _aligned(fit: _Fit, state: Shapes, expected: Shapes) -> Aligned:
    stripped, unwrapped = _prefixes(fit, state)
    said = tuple(
        f"{key} {tuple(expected[key].shape)} stays the model's own, the file has "
        + (f"{tuple(fit.after[key].shape)}, left out" if key in fit.after else "none")
        for key in fit.head
    )
    added = fit.change.added and any(
        fit.change.apply(_without(fit.change.parts, key), {}) != new
        for new, key in fit.origin.items()
    )
    adapted = sorted(k for k, v in fit.after.items() if not _same(v, fit.before.get(k)))
    return Aligned(
        state={key: value for key, value in fit.after.items() if key not in fit.head},
        prefix_stripped=stripped,
        prefix_added=BACKBONE if added else "",
        unwrapped=unwrapped,
        ignored=fit.ignored,
        adapted=tuple(adapted),
        new_head=said,
    )


def _same(value: Tensor, before: Tensor | None) -> bool:
    if before is None or value.dtype != before.dtype:
        return False
    return value is before or torch.equal(value, before)


def _prefixes(fit: _Fit, state: Shapes) -> tuple[str, tuple[str, ...]]:
    """What went off the front of keys, wrappers' parts among it, and parts from their middle."""
    change = fit.change
    own = change.prefix.split(".")[:-1]
    taken: list[str] = []
    for part in _common(key for key in state if key not in fit.ignored):
        if part in change.parts:
            taken.append(part)
        elif own and part == own[0]:
            taken.append(own.pop(0))
        else:
            break
    inside = {part for key in state for part in key.split(".")[len(taken) :]}
    stripped = "".join(f"{part}." for part in (*taken, *own)) + change.partial
    return stripped, tuple(sorted(inside & change.parts))


def _misfit(state: Shapes, expected: Shapes, fits: list[_Fit]) -> str:
    """What does not fit, by the way that comes nearest, and the option that would help."""
    fit = max(fits, key=lambda fit: fit.matching)  # the plainest of equals
    if fit.error is not None:
        return f"it does not fit the model: {fit.error}"
    shapes = [
        f"{key} (file {tuple(fit.after[key].shape)}, model {tuple(expected[key].shape)})"
        for key in fit.misshapen
    ]
    kinds = (("missing", fit.missing), ("unexpected", fit.unexpected), ("misshapen", shapes))
    problems = "; ".join(f"{name}: {some(keys, len(keys))}" for name, keys in kinds if keys)
    stripped, _ = _prefixes(fit, state)
    seen = f"keys begin with {stripped!r}, which was taken off; " if stripped else ""
    heads = _other_head(fit, expected)
    if heads and replace(fit, head=heads).exact:
        remedy = (
            "create the model with the file's num_classes, or pass new_head=True (--new-head) to "
            "keep the model's own head, untrained"
        )
    else:
        remedy = "create the model with the name, num_classes and options of the file's training"
    return f"it does not fit the model ({seen}{problems}); {remedy}"


def _cause(state: Shapes, target: _Target) -> str | None:
    """Why a file that may well hold the model's tensors is not taken; None if nothing is known."""
    whole, expected = _whole_groups(state, target), target.expected
    if len(whole) > 1:
        return (
            f"it holds several sets of this model's weights, under {' and '.join(whole)}; name one "
            f"with key={whole[0]!r} (--key {whole[0]})"
        )
    key = f"take one part with key={whole[0]!r} (--key {whole[0]})" if whole else ""
    if twice := [pair for name in state if (pair := _doubled(name, state, expected))]:
        names = [name for _, name in twice]
        return f"it has {some(names, len(names))} with and without {twice[0][0]!r}; " + (
            key or "save one model's state_dict()"
        )
    if whole:
        others = [name for name in state if not name.startswith(f"{whole[0]}.")]
        return (
            f"the keys under {whole[0]!r} are this model's, but it has others too: "
            f"{some(others, len(others))}; {key}"
        )
    return explain_keys(name for name in state if name not in expected)


def _doubled(name: str, state: Shapes, expected: Shapes) -> tuple[str, str] | None:
    """What a key has in front of another of the file that is the model's, and that other."""
    if name in expected:
        return None
    rest = name
    for _ in range(_DEPTH):
        rest = rest.partition(".")[2]
        if rest in state and rest in expected:
            return name.removesuffix(rest), rest
    return None


def _whole_groups(state: Shapes, target: _Target) -> list[str]:
    """What keys begin with below which the whole model lies, wrappers' parts aside."""
    expected = target.expected
    lead = "".join(f"{part}." for part in _common(state))
    sizes = Counter(key.removeprefix(lead).partition(".")[0] for key in state)
    parts = _foreign_parts(expected)
    found = []
    for first, size in sizes.most_common(_GROUPS):
        if 2 * size < len(expected):
            break
        keys = [key for key in state if key.startswith(f"{lead}{first}.")]
        below = _common(keys)
        for name in (".".join(below[: i + 1]) for i in range(len(below))):
            origin = {_without(parts, key.removeprefix(f"{name}.")): key for key in keys}
            if len(origin) < len(keys):
                continue
            fit = _try(state, _Change(), origin, target)
            # Another head is the next question, and a part of the file the first.
            if replace(fit, head=_other_head(fit, expected)).exact:
                found.append(name)
                break
    return sorted(found)
