"""Which class each folder of images holds: matched by evidence, or asked about, never guessed."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from vssm.artifact.preprocessing import read_labels

NUMERIC, TEXT = "numeric", "text"  # what `classes` may say in place of a file
ClassesGiven = str | os.PathLike[str] | None  # a file, one of these two words, or nothing
_ASK: Final = "name the folder of each class in a file with --classes FILE"
_NUMBER: Final = re.compile(r"[+-]?\d+(\.\d+)?")
_NUMBERED: Final = re.compile(r"(\D*)\d.*", re.DOTALL)
_SPLITS: Final = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_SHOWN: Final = 5


@dataclass(frozen=True)
class FolderMatch:
    """The folder of every class, and how that was found.

    Attributes:
        names: by class, the folder that holds its images; it may be absent from the disk.
        rule: how folders were matched to classes, in words.
    """

    names: tuple[str, ...]
    rule: str


def match_folders(
    root: str,
    folders: Sequence[str],
    num_classes: int,
    *,
    labels: Sequence[str] | None = None,
    classes: ClassesGiven = None,
) -> FolderMatch:
    """Decide which class each folder holds.

    What the user says counts first. Else folders that have exactly the names of the model's labels
    are matched by name, whatever their order. Else the i-th folder by name is class i, as in
    ImageNet, where nothing speaks against it: names that are nearly labels, or numbers whose order
    as text is another than as numbers, are asked about.

    Args:
        root: what holds the folders, as errors name it, such as "images=val".
        folders: their names.
        num_classes: classes of the model.
        labels: its class names; None where it has none.
        classes: a file that names the folder of each class, as `read_labels` takes it; "numeric" or
            "text" for the order of the folders' names; None: by the rules above.

    Raises:
        ValueError: the folders are not the classes, or it is not certain which is which.
    """
    if labels is not None and len(labels) != num_classes:
        raise ValueError(
            f"labels={len(labels)} names for {num_classes} classes; use the labels of this model"
        )
    if classes is not None:
        match = _as_given(root, folders, num_classes, classes)
        # What the user says counts, but not against the model's own
        # labels: one of both is a mistake.
        _check_against_labels(root, match, folders, labels)
        return match
    return _by_label(root, folders, labels or ()) or _by_order(
        root, folders, num_classes, has_labels=labels is not None
    )


def _as_given(
    root: str, folders: Sequence[str], num_classes: int, classes: str | os.PathLike[str]
) -> FolderMatch:
    """Folders as `classes` says."""
    if classes in {NUMERIC, TEXT}:
        _check_count(root, folders, num_classes)
        by_number = classes == NUMERIC
        names = _in_number_order(root, folders) if by_number else sorted(folders)
        kind = "number" if by_number else "text"
        return FolderMatch(tuple(names), f"--classes {classes}: the folders in order of {kind}")
    named = read_labels(classes, num_classes, name="classes")
    _check_distinct(named)
    # A folder too many is refused, a class without one is not: a
    # part of a data set can be evaluated too.
    unknown = sorted(set(folders) - set(named))
    if unknown:
        near = [name for name in named if _simple(name) == _simple(unknown[0])]
        hint = f" (the file has {near[0]!r})" if near else ""
        raise ValueError(
            f"{root} holds the folder {unknown[0]!r}, which is not a class of the file {classes}"
            f"{hint}; {len(unknown)} of {len(folders)} folders are not in it: name all folders "
            "there, or move them away"
        )
    return FolderMatch(named, f"named by the file {os.path.basename(os.fspath(classes))}")


def _check_distinct(names: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            raise ValueError(
                f"classes: the folder {name!r} is named for the classes {first[name]} and {i}; "
                "name a folder of its own for each"
            )


def _check_against_labels(
    root: str, match: FolderMatch, folders: Collection[str], labels: Sequence[str] | None
) -> None:
    """Refuse a mapping that calls a folder another class than the label of the same name."""
    once = _places(labels or ())
    for i, name in enumerate(match.names):
        places = once.get(name, [i])
        if name in folders and i not in places:
            raise ValueError(
                f"{root}: by --classes the folder {name!r} is class {i}, but the model's labels "
                f"call class {places[0]} so; leave --classes out to match folders to labels by "
                "name, or export the model with the labels that are right"
            )


def _by_label(root: str, folders: Sequence[str], labels: Sequence[str]) -> FolderMatch | None:
    """Folders that are labels; None where no folder looks like one."""
    places = _places(labels)
    strange = [name for name in folders if name not in places]
    if not strange and folders:
        # ImageNet has labels twice ("crane", "maillot"): by name
        # such a folder would be either class.
        twice = [name for name in folders if len(places[name]) > 1]
        if twice:
            raise ValueError(
                f"{root} holds the folder {twice[0]!r}, which is the label of the classes "
                f"{places[twice[0]][0]} and {places[twice[0]][1]}; {_ASK}"
            )
        return FolderMatch(tuple(labels), "matched to the model's labels by name")
    known = len(folders) - len(strange)
    # ImageNet's labels list synonyms ("tench, Tinca tinca"), and folders often have one of them.
    spelled = {_simple(part): label for label in labels for part in (label, *label.split(","))}
    near = [name for name in strange if _simple(name) in spelled]
    if not known and not near:
        return None
    wrong = near[0] if near else strange[0]
    like = f", much like the label {spelled[_simple(wrong)]!r}" if near else ""
    raise ValueError(
        f"{root}: {known} of its {len(folders)} folders have the name of one of the model's "
        f"{len(labels)} labels, but {wrong!r} does not{like}; give each folder the exact name of "
        f"its label, or {_ASK}"
    )


def _by_order(
    root: str, folders: Sequence[str], num_classes: int, *, has_labels: bool
) -> FolderMatch:
    """The i-th folder by name is class i, if names and number of the folders allow it."""
    _check_count(root, folders, num_classes)
    # Two folders and a model of two classes would otherwise pass, as train and val.
    if _SPLITS.issuperset(name.casefold() for name in folders):
        raise ValueError(
            f"{root} holds the folders {', '.join(folders)}, which are parts of a data set; give "
            f"one of them, or {_ASK} if they are the classes"
        )
    # A wrong order gives an accuracy too, only not the model's: 6.5 % where the truth was 100 %.
    by_text, by_number = sorted(folders), _number_order(folders)
    if by_number != by_text:
        first = next(i for i, name in enumerate(by_text) if name != by_number[i])
        raise ValueError(
            f"{root} holds folders with numbers for names, in another order as text "
            f"({_window(by_text, first)}) than as numbers ({_window(by_number, first)}), so it is "
            f"not certain which is class {first}; say "
            f"--classes numeric or --classes text, as the model was trained, or {_ASK}"
        )
    reason = "no folder has the name of a label" if has_labels else "the model has no labels"
    return FolderMatch(tuple(by_text), f"the i-th folder by name is class i; {reason}")


def _check_count(root: str, folders: Sequence[str], num_classes: int) -> None:
    if len(folders) != num_classes:
        raise ValueError(
            f"{root} holds {len(folders)} folders, but the model has {num_classes} classes; "
            f"give one for each, or {_ASK}"
        )


def _number_key(folders: Sequence[str]) -> Callable[[str], Any] | None:
    """What sorts the folders by number: all are numbers, or all are numbered behind one prefix."""
    if all(_NUMBER.fullmatch(name) for name in folders):
        # Not float: it would take long numbers that differ in their last digit for one.
        return Decimal
    prefixes = {found[1] if (found := _NUMBERED.fullmatch(name)) else None for name in folders}
    return _natural if len(prefixes) == 1 and None not in prefixes else None


def _number_order(folders: Sequence[str]) -> list[str]:
    """The folders as they would stand by their numbers; words stay where they are.

    Two spellings of one number stand in the other order than as text, so that they are seen.
    """
    key = _number_key(folders)
    if key is not None:
        # Reversed first: sorting is stable, so "01" and "1" stay in
        # the order that text does not have.
        return sorted(sorted(folders, reverse=True), key=key)
    numbers = {name for name in folders if _NUMBER.fullmatch(name)}
    in_order = iter(sorted(numbers, key=Decimal))
    return [next(in_order) if name in numbers else name for name in sorted(folders)]


def _natural(name: str) -> tuple[str | int, ...]:
    """Text and numbers in turn: the text in front, the number behind it, ..."""
    parts = re.split(r"(\d+)", name)
    # re.split with a group gives text and digits in turn, so keys compare like with like.
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


def _in_number_order(root: str, folders: Sequence[str]) -> list[str]:
    """The folders by their numbers, for `classes="numeric"`."""
    key = _number_key(folders)
    if key is None:
        odd = next((n for n in sorted(folders) if not _NUMBER.fullmatch(n)), "")
        raise ValueError(
            f"{root}: classes='numeric', but the folder {odd!r} is not a number; say --classes "
            f"text, or {_ASK}"
        )
    ordered = sorted(folders, key=key)
    for one, other in itertools.pairwise(ordered):
        if key(one) == key(other):
            raise ValueError(
                f"{root}: classes='numeric', but the folders {one!r} and {other!r} are the same "
                f"number; {_ASK}"
            )
    return ordered


def _places(labels: Sequence[str]) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return found


def _simple(name: str) -> str:
    """A name without what people write differently: case, accents' form, spaces, signs, padding."""
    # A letter with an accent has two forms in Unicode, which look the same in a listing.
    text = unicodedata.normalize("NFKC", name).casefold()
    letters = "".join(c for c in text if c.isalnum()) or text
    return letters.lstrip("0") or "0" if letters.isdecimal() else letters


def _window(names: Sequence[str], middle: int) -> str:
    """Some names around one place."""
    start = max(0, middle - 2)
    some = names[start : start + _SHOWN]
    before, behind = "..., " * (start > 0), ", ..." * (start + _SHOWN < len(names))
    return f"{before}{', '.join(some)}{behind}"
