"""Where in a checkpoint the weights are: under names that training codes use, or a given key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from torch import Tensor

from vssm.checkpoints.pickle_machine import Stub, TensorRecord
from vssm.errors import CheckpointError
from vssm.files.text import shown

# Names under which training codes save a model's weights, at any depth of such names: Vim, VMamba,
# GroupMamba, mmcv, Lightning, PyTorch's tutorials, BasicSR, DeepSpeed; and their averaged weights.
WRAPPERS: Final = {
    "model": (
        *("model", "state_dict", "model_state_dict", "model_state", "params", "net", "network"),
        *("weights", "module", "checkpoint"),
    ),
    "ema": (
        *("model_ema", "state_dict_ema", "params_ema", "ema", "ema_state_dict", "ema_model"),
        "shadow",
    ),
}
# What may stand beside tensors in an unwrapped file without being a weight.
_METADATA: Final = frozenset(
    {
        *("arch", "args", "config", "hyper_parameters", "meta", "version"),
        *("epoch", "iteration", "step", "best_acc", "max_accuracy"),
        *("optimizer", "lr_scheduler", "scheduler", "scaler"),
    }
)
# What tensors of other kinds are in a pickle, by the end of a name: in words, and the remedy.
_PLAIN: Final = "torch.save({k: torch.as_tensor(v) for k, v in state.items()}, FILE)"
_UNUSUAL: Final = {
    "multiarray._reconstruct": ("a NumPy array", f"save plain tensors: {_PLAIN}"),
    "_rebuild_sparse_tensor": ("a sparse tensor", "save dense ones, each by its to_dense()"),
    "_rebuild_qtensor": ("a quantised tensor", "take the float model that was quantised"),
    "_rebuild_meta_tensor_no_storage": (
        "a tensor without values (device meta)",
        "save the model once its weights are loaded",
    ),
    "tensor of a storage type without weights": (
        "a tensor of complex or packed numbers",
        "save weights of real numbers",
    ),
}
_WORDS: Final[dict[type, str]] = {
    **{dict: "a mapping", int: "a number", float: "a number", str: "a text", type(None): "nothing"},
    **{TensorRecord: "a tensor", Tensor: "a tensor"},
}
_DEPTH: Final = 4
_SHOWN: Final = 6
_LOOKED_AT: Final = 1000
REMEDY: Final = "give a .safetensors file, or a .pth file that holds a state dict"


@dataclass(frozen=True)
class Selection:
    """The entries of a state dict, the dotted key they lay under, and what stood beside them."""

    entries: Mapping[str, object]
    wrapper: str = ""
    ignored: tuple[str, ...] = ()


def select(root: object, *, weights: str = "model", key: str | None = None) -> Selection:
    """Find the state dict in what a file held.

    Args:
        root: a tree of mappings.
        weights: "model" or "ema", whose usual names are looked for where there is no `key`.
        key: dotted path of the mapping, or of the keys of a flat one that begin with it.

    Raises:
        CheckpointError: there is none, or more than one. The message does not name the file.
    """
    if not isinstance(root, dict):
        raise CheckpointError(f"it holds {kind(root)}, not a state dict; save model.state_dict()")
    if key is not None:
        return _by_key(root, key)
    found = _find(root, WRAPPERS[weights])
    if weights == "model" and not found and _is_state(root):
        found = [("", root)]
    if len(found) > 1:
        names = " and ".join(path for path, _ in found)
        raise CheckpointError(
            f"it holds weights under {names}; name one with key={found[0][0]!r} "
            f"(--key {found[0][0]})"
        )
    if not found:
        raise CheckpointError(_nothing_found(root, weights))
    path, entries = found[0]
    first = path.partition(".")[0]
    beside = [k for k in root if k != first] if path else []
    beside += [k for k, v in entries.items() if _is_metadata(k, v)]
    plain = {k: v for k, v in entries.items() if not _is_metadata(k, v)}
    return Selection(_texts(plain), path, tuple(sorted(map(text, beside))))


def text(value: object, most: int = 60) -> str:
    """A key or name of a file for people: one line, cut, with control characters escaped."""
    if not isinstance(value, str):
        return f"({type(value).__name__})" if isinstance(value, tuple | bytes) else str(value)
    return shown(value, limit=most)


def some(names: Iterable[str], count: int) -> str:
    """At most six of `count` names, and how many there are."""
    shown = ", ".join(text(name, 100) for name in islice(names, _SHOWN))
    return shown if count <= _SHOWN else f"{shown}, ... ({count:,} in all)"


def kind(value: object) -> str:
    """What an entry is, for people."""
    if (unusual := _unusual(value)) is not None:
        return unusual[0]
    if isinstance(value, Stub):
        return f"a {text(value.name, 100)}"
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def _unusual(value: object) -> tuple[str, str] | None:
    """What a tensor of another kind is, and the remedy; None for everything else."""
    if not isinstance(value, Stub):
        return None
    return next((found for end, found in _UNUSUAL.items() if value.name.endswith(end)), None)


def _by_key(root: dict[Any, Any], key: str) -> Selection:
    """The mapping at a dotted path, whose parts may hold dots; or a flat one's keys below it."""
    node, path, rest = root, "", key
    while rest:
        parts = rest.split(".")
        # The longest first: a name in the file may hold dots of its own.
        heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        head = next((h for h in heads if isinstance(node.get(h), dict)), None)
        if head is None:
            break
        node, path = node[head], f"{path}.{head}" if path else head
        rest = rest[len(head) + 1 :]
    entries = node
    if rest:
        below = f"{rest}."
        entries = {
            k.removeprefix(below): v
            for k, v in node.items()
            if isinstance(k, str) and k.startswith(below)
        }
    found = [("", entries)] if _is_state(entries) else _find(entries, WRAPPERS["model"])
    if len(found) != 1:
        raise CheckpointError(f"key={key!r} leads to no weights; {_places(root)}")
    beside = (k for k in node if not (isinstance(k, str) and k.startswith(f"{rest}.")))
    others = beside if rest else (k for k in root if k != path.partition(".")[0])
    where = ".".join(filter(None, (key, found[0][0])))
    return Selection(_texts(found[0][1]), where, tuple(sorted(text(k) for k in others)))


def _find(root: dict[Any, Any], names: tuple[str, ...]) -> list[tuple[str, dict[Any, Any]]]:
    """State dicts with one of `names` in their path, whose other parts are the usual wrappers'.

    Each mapping is looked at once: a file can have one in many places, inside itself as well.
    """
    found: list[tuple[str, dict[Any, Any]]] = []
    seen = {id(root)}
    todo: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), root)]
    for path, node in todo:  # which grows meanwhile
        if not set(path).isdisjoint(names) and _is_state(node):
            found.append((".".join(path), node))
        for name in dict.fromkeys((*names, *WRAPPERS["model"])):
            below = node.get(name)
            if isinstance(below, dict) and id(below) not in seen and len(path) < _DEPTH:
                seen.add(id(below))
                todo.append(((*path, name), below))
    return found


def _nothing_found(root: dict[Any, Any], weights: str) -> str:
    averaged = _find(root, WRAPPERS["ema"])
    if weights == "model" and averaged:
        return f"it has averaged weights alone, under {averaged[0][0]}; use weights='ema' (--ema)"
    if weights == "ema" and (_find(root, WRAPPERS["model"]) or _is_state(root)):
        names = ", ".join(WRAPPERS["ema"])
        return f"it has no averaged weights ({names}); use weights='model' (leave out --ema)"
    for name in (*WRAPPERS["model"], *WRAPPERS["ema"]):
        if isinstance(root.get(name), Stub) and _unusual(root[name]) is None:
            return (
                f"under {name} it holds {kind(root[name])}, a pickled object, not a state dict; "
                "save its state_dict()"
            )
    return f"no weights are under {', '.join(WRAPPERS[weights])}; {_places(root)}"


def _places(root: dict[Any, Any]) -> str:
    """Where a file has tensors, and the option that names one of these places."""
    found: list[str] = []
    unusual: list[tuple[str, tuple[str, str]]] = []
    seen = {id(root)}
    todo: list[tuple[str, dict[Any, Any]]] = [("", root)]
    for path, node in todo:  # which grows meanwhile
        if path and _is_state(node):
            found.append(path)
        for name, value in islice(node.items(), _LOOKED_AT):
            if (answer := _unusual(value)) is not None:
                unusual.append((text(name), answer))
            is_new = isinstance(value, dict) and id(value) not in seen
            if is_new and isinstance(name, str) and len(todo) < _LOOKED_AT:
                seen.add(id(value))
                todo.append((f"{path}.{name}"[-_LOOKED_AT:] if path else name, value))
    if not found and unusual:
        name, (other, remedy) = unusual[0]
        return f"in place of tensors it holds others: {name} is {other}; {remedy}"
    if not found:
        what = [f"{text(k)} ({kind(v)})" for k, v in islice(root.items(), _SHOWN)]
        return f"it holds {', '.join(what) or 'nothing'} and no state dict; {REMEDY}"
    return (
        f"it has tensors under {some(found, len(found))}; name one with key={text(found[0])!r} "
        f"(--key {text(found[0])})"
    )


def _texts(entries: Mapping[Any, object]) -> dict[str, object]:
    for key in entries:
        if not isinstance(key, str):
            raise CheckpointError(
                f"the key {text(key)} is {kind(key)}, not a text; save model.state_dict()"
            )
    return dict(entries)


def _is_metadata(key: object, value: object) -> bool:
    return key in _METADATA and not isinstance(value, Tensor | TensorRecord)


def _is_state(node: Mapping[Any, Any]) -> bool:
    """Whether there are tensors, and no mappings but known ones that are not weights."""
    return any(isinstance(value, Tensor | TensorRecord) for value in node.values()) and not any(
        isinstance(value, dict) and key not in _METADATA for key, value in node.items()
    )
