"""`upstream`: upstream model code runs over this package's operators while it lasts."""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from torch.autograd import Function

from vssm.compat.packages.provided import AROUND, BY_NAME, COMPILED, FUNCTIONS, PACKAGES, Provided
from vssm.compat.packages.stand_in_table import SHELLS, STAND_INS

# Marks a name that its owner only inherits: to put it back is to delete ours.
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
        # The raw entry: getattr would give a staticmethod or classmethod already bound.
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


PREFER: Final = ("ours", "installed")
_ROOTS: Final = frozenset(
    name.partition(".")[0]
    for table in (FUNCTIONS, AROUND, COMPILED, PACKAGES, STAND_INS, SHELLS)
    for name in table
)
# These look at what is installed, such as triton, and would go on to call a stand-in.
_NEIGHBOURS: Final = frozenset({"torch", "torchvision", "onnx", "onnxscript", "onnx_ir"})
# Frames between an import statement and the finder, skipped to see who asks.
_IMPORTERS: Final = frozenset(
    {"vssm", "importlib", "_frozen_importlib", "_frozen_importlib_external"}
)
_COPIED: Final = (
    "if it computes the same, import it from mamba_ssm, or report.replace(module, "
    "'selective_scan_fn', vssm.compat.selective_scan_fn)"
)
# Provided packages whose files on disk are used all the same: a fork's mamba_simple.py, or
# PlainMamba's own mmcls.
_OWN_PATH: Final = frozenset({"mamba_ssm", "causal_conv1d", "mmcls", "mmcls.models"})


@contextmanager
def upstream(*, prefer: str = "ours") -> Iterator[UpstreamReport]:
    """Make upstream model code importable and runnable over this package's operators.

    Inside, imports of mamba_ssm, causal_conv1d and their kind give functions of this package with
    upstream's signatures; scan functions that a repository defines itself (VMamba, GroupMamba) are
    replaced as its files are imported, or at once where they already are. Modules of the user's
    own mamba_ssm (a fork's `mamba_simple.py`, say) are used as they are, over these functions.
    timm, mmcv, fvcore and triton get stand-ins where they are not installed. Nothing else
    is touched, and the report says what was.

    At the end every replaced name of a module that was there before is put back, and the modules
    that were provided are gone; a model made inside keeps the functions that it was made with.

    Args:
        prefer: "ours"; or "installed" to leave what is installed and works, and to provide the
            rest.

    Yields:
        The report, growing while modules are imported.

    Raises:
        ValueError: `prefer` is another word, or this is inside another `upstream`.
    """
    if prefer not in PREFER:
        raise ValueError(f"prefer={prefer!r} is not one of {', '.join(PREFER)}; choose one")
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        raise ValueError("upstream() inside upstream(): leave the outer one first")
    report = UpstreamReport()
    before = dict(sys.modules)
    if prefer == "ours":
        _patch_loaded(report)
    for module in list(before.values()):
        _patch_by_name(module, report, undo=True)
    finder = _Finder(prefer, report)
    # In front, or the path finder would take an installed package before the tables are asked.
    sys.meta_path.insert(0, finder)
    try:
        yield report
    finally:
        sys.meta_path.remove(finder)
        _forget(before)
        report.restore()


class _Finder(MetaPathFinder):
    """Finds the modules of the tables, and looks at every other module once it is executed."""

    def __init__(self, prefer: str, report: UpstreamReport) -> None:
        self._ours = prefer == "ours"
        self._report = report

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a provided module, of a real one to be watched, or None."""
        real = _others(fullname, path, target)
        names = self._names(fullname, real)
        if names is not None:
            self._report.provided.append(fullname)
            own = (real and real.submodule_search_locations) or []
            # Each is a package: `import a.b.c` asks a.b for a path, even where a.b is one file
            # upstream.
            spec = ModuleSpec(fullname, _ProvidingLoader(names), is_package=True)
            spec.submodule_search_locations = list(own) if fullname in _OWN_PATH else []
            return spec
        if real is not None and isinstance(real.loader, importlib.machinery.SourceFileLoader):
            self._watch(fullname, real.loader)
        return real

    def _names(self, name: str, real: ModuleSpec | None) -> dict[str, Any] | None:
        """What to provide as `name`; None to leave it to the other finders."""
        if self._ours:
            for table in (FUNCTIONS, AROUND):
                if name in table:
                    return table[name]
            if name in SHELLS and not _installed("mmcv"):
                return SHELLS[name]
            if name in COMPILED:
                return COMPILED[name]
        if real is not None:
            return None
        for table in (PACKAGES, FUNCTIONS, AROUND):
            if name in table:
                return table[name]
        root = name.partition(".")[0]
        # Never a part of an installed package: a timm that has no such module must say so itself.
        absent = name == root or isinstance(sys.modules.get(root), Provided)
        return STAND_INS[name] if name in STAND_INS and absent and not _for_torch() else None

    def _watch(self, name: str, loader: Any) -> None:
        """Look at the module after it has run; what is installed and fails to load is provided."""
        execute = loader.exec_module
        root = name.partition(".")[0]
        names = FUNCTIONS.get(name, AROUND.get(name))

        # The loader belongs to this one spec, so a function put into it is seen by nobody else.
        def run(module: ModuleType) -> None:
            if root in _ROOTS:
                self._report.installed.append(name)
            try:
                execute(module)
            # mamba_ssm installs on machines where its files do not load, for want of triton or
            # CUDA.
            except ImportError as error:
                if names is None:
                    raise
                vars(module).update(names)
                self._report.installed.remove(name)
                self._report.provided.append(name)
                self._report.notes.append(f"{name} is installed but cannot be imported: {error}")
            finally:
                _hide_triton()
            _patch_by_name(module, self._report, undo=False)

        loader.exec_module = run


class _ProvidingLoader(Loader):
    """Makes a `Provided` module."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, with its names."""
        return Provided(spec.name, self._names, list(spec.submodule_search_locations or []))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def _others(
    name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
) -> ModuleSpec | None:
    """What the other finders say."""
    for finder in sys.meta_path:
        if not isinstance(finder, _Finder) and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _for_torch() -> bool:
    """Whether torch or a package beside it asks: they must see what is installed, no stand-in."""
    frame = inspect.currentframe()
    while frame is not None:
        asking = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if asking not in _IMPORTERS:
            return asking in _NEIGHBOURS
        frame = frame.f_back
    return False


def _hide_triton() -> None:
    """Files that were just imported hold the stand-in; torch would take it for the real one."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" and isinstance(sys.modules[name], Provided):
            del sys.modules[name]


def _installed(root: str) -> bool:
    loaded = sys.modules.get(root)
    return _others(root) is not None if loaded is None else not isinstance(loaded, Provided)


def _patch_loaded(report: UpstreamReport) -> None:
    """Replace the functions of modules that are already imported, wherever they are bound.

    Classes stay: objects of them exist, and isinstance must go on knowing them. Their methods
    reach the replaced functions.
    """
    ours: dict[int, Any] = {}
    for name, names in FUNCTIONS.items():
        loaded = vars(sys.modules[name]) if name in sys.modules else {}
        for key, function in names.items():
            # mamba_ssm binds None to what it could not import: by identity, that is every None
            # there is.
            if key in loaded and not isinstance(loaded[key], type) and loaded[key] is not None:
                ours[id(loaded[key])] = function
    if not ours:
        return
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in ours and not module.__name__.startswith("vssm."):
                report.replace(module, key, ours[id(value)])


def _patch_by_name(module: ModuleType, report: UpstreamReport, *, undo: bool) -> None:
    """Replace the scans that a repository's own file defines, if name and arguments are known."""
    names = getattr(module, "__dict__", {})
    if getattr(module, "__name__", "vssm").split(".")[0] == "vssm":
        return
    for title, (function, arguments) in BY_NAME.items():
        name, _, method = title.partition(".")
        found = names.get(name)
        # Only where it is defined: names that were imported from there are replaced with it.
        if found is None or getattr(found, "__module__", None) != module.__name__:
            continue
        place = f"{module.__name__}.{title}"
        # Another class of that name: its `apply` has nothing to do with autograd.
        if method and not (isinstance(found, type) and issubclass(found, Function)):
            continue
        # `apply` itself takes anything; what it passes on is forward's arguments behind ctx.
        given = _arguments(found.forward if method else found, skip=1 if method else 0)
        if given != arguments:
            # A gate is in mamba_ssm's signature alone: VMamba's function of the same name has none.
            if name != "selective_scan_fn" or "z" not in given:
                report.notes.append(f"{place} takes {given}, not {arguments}: left as it is")
            elif module.__name__.partition(".")[0] not in _ROOTS:
                report.notes.append(f"{place} looks like mamba_ssm's: left as it is; {_COPIED}")
            continue
        ours = staticmethod(function) if method else function
        kept = list(report._undo)
        _replace_everywhere(found, module, name, method, ours, report)
        if not undo:  # first imported inside: it never had another
            report._undo[:] = kept


def _replace_everywhere(
    found: Any,
    module: ModuleType,
    name: str,
    method: str,
    ours: Any,
    report: UpstreamReport,
) -> None:
    if method:
        report.replace(found, method, ours)
        return
    for other in list(sys.modules.values()):
        for key, value in list(getattr(other, "__dict__", {}).items()):
            if value is found:
                report.replace(other, key, ours)
    # A file that was loaded by its path alone is not in sys.modules.
    if vars(module)[name] is found:
        report.replace(module, name, ours)


def _arguments(function: Any, *, skip: int) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)[skip:]
    except (TypeError, ValueError):
        return ()


def _forget(before: dict[str, ModuleType]) -> None:
    """Take out what was imported of the upstream packages, and put back what was there."""
    for name in list(sys.modules):
        # An installed package's own files go as well: they hold our functions, and a later import
        # has to give theirs.
        if name.partition(".")[0] in _ROOTS and name not in before:
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            # A package that was there before has its submodules as attributes too.
            if parent in before and vars(before[parent]).get(child) is module:
                delattr(before[parent], child)
