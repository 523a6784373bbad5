"""What `upstream` did, for people to check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_INHERITED = object()


@dataclass
class UpstreamReport:
    """What is in place inside `upstream`; it grows as modules are imported.

    Attributes:
        provided: modules that this package stands in for.
        patched: names of modules and classes that now are ours, as "module.name".
        installed: modules of upstream packages whose own files are used.
        notes: what was looked at and left, and why.
    """

    provided: list[str] = field(default_factory=list)
    patched: list[str] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _undo: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)

    def replace(self, owner: Any, name: str, function: Any) -> None:
        """Put `function` in the place of `owner.name` until `upstream` ends.

        For code that no table knows, such as the scan method of a hand-written block.

        Raises:
            AttributeError: `owner` has no such name: nothing would be replaced.
        """
        if not hasattr(owner, name):
            raise AttributeError(
                f"{owner} has no {name!r} to replace; give the class or module that defines it"
            )
        self._undo.append((owner, name, vars(owner).get(name, _INHERITED)))
        setattr(owner, name, function)
        where = getattr(owner, "__module__", None)
        title = f"{where}.{owner.__qualname__}" if where else owner.__name__
        self.patched.append(f"{title}.{name}")

    def restore(self) -> None:
        """Undo every replacement, the last first."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def __str__(self) -> str:
        parts = [
            f"{word}: {', '.join(names)}"
            for word, names in (
                ("provided", self.provided),
                ("patched", self.patched),
                ("their own files", self.installed),
                ("notes", self.notes),
            )
            if names
        ]
        return "; ".join(parts) or "nothing provided or patched"
