"""`upstream`: upstream model code runs over this package's operators while it lasts."""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final, cast

from torch import Tensor
from torch.autograd import Function

from vssm.compat.packages import signatures
from vssm.compat.packages.provided import (
    AROUND,
    BY_NAME,
    FUNCTIONS,
    PACKAGES,
    Compiled,
    Provided,
    compiled,
)
from vssm.compat.packages.signatures import Signature
from vssm.compat.packages.stand_in_table import ABSENT, LOOKED_FOR, SHELLS, STAND_INS
from vssm.compat.surroundings import OnTheCpu, as_python, uncompiled
from vssm.errors import UnsupportedError

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
        missed: imports that failed; the code that asked may have hidden that.
    """

    provided: list[str] = field(default_factory=list)
    patched: list[str] = field(default_factory=list)
    installed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
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


class NoScanError(UnsupportedError):
    """A module that runs, and calls no selective scan that is known."""


PREFER: Final = ("ours", "installed")
_ROOTS: Final = ABSENT | {
    name.partition(".")[0] for table in (FUNCTIONS, AROUND, PACKAGES, SHELLS) for name in table
}
# These look at what is installed, such as triton, and would go on to call a stand-in.
_NEIGHBOURS: Final = frozenset({"torch", "torchvision", "onnx", "onnxscript", "onnx_ir"})
_INSTALLED: Final = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib"))
# Frames between an import statement and the finder, skipped to see who asks.
_IMPORTERS: Final = frozenset(
    {"vssm", "importlib", "_frozen_importlib", "_frozen_importlib_external"}
)
# Upstream packages that repositories carry a copy of inside a package of their own.
_VENDORED: Final = ("mamba_ssm", "causal_conv1d")
# Compiles what a file names when it is imported.
_COMPILER: Final = "torch.utils.cpp_extension"
# What Python puts into every class.
_OF_ANY_CLASS: Final = frozenset(vars(type("Any", (Tensor,), {})))
# Provided packages whose files on disk are used all the same: a fork's mamba_simple.py, or
# PlainMamba's own mmcls.
_OWN_PATH: Final = frozenset({"mamba_ssm", "causal_conv1d", "mmcls", "mmcls.models"})


@contextmanager
def upstream(
    *, prefer: str = "ours", scans: Mapping[str, str] | None = None
) -> Iterator[UpstreamReport]:
    """Make upstream model code importable and runnable over this package's operators.

    Inside, imports of mamba_ssm, causal_conv1d and their kind give functions of this package with
    upstream's signatures; selective scans that a repository defines itself, known by what they take
    and compute, are replaced as its files are imported, or at once where they already are. Modules
    of the user's own mamba_ssm (a fork's `mamba_simple.py`, say) are used as they are, over these
    functions.
    timm, mmcv, fvcore and triton get stand-ins where they are not installed, and a GPU that the
    code names is the CPU. Nothing else is touched, and the report says what was.

    At the end every replaced name of a module that was there before is put back, and the modules
    that were provided are gone; a model made inside keeps the functions that it was made with.

    Args:
        prefer: "ours"; or "installed" to leave what is installed and works, and to provide the
            rest.
        scans: selective scans that are not known by themselves, "module:name" or
            "module:Class.method", and how each takes its operands: "channels" for u of (batch,
            d_inner, seqlen), "tokens" for (batch, seqlen, d_inner), and behind a colon what the
            parameters are where they have other names ("tokens:u,delta,A,B,C,D").

    Yields:
        The report, growing while modules are imported.

    Raises:
        ValueError: `prefer` is another word, this is inside another `upstream`, or a scan of
            `scans` is not there.
    """
    if prefer not in PREFER:
        raise ValueError(f"prefer={prefer!r} is not one of {', '.join(PREFER)}; choose one")
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        raise ValueError("upstream() inside upstream(): leave the outer one first")
    named = {place: Signature.parse(text) for place, text in (scans or {}).items()}
    report = UpstreamReport()
    before = dict(sys.modules)
    finder = _Finder(prefer, report, named)
    # In front, or the path finder would take an installed package before the tables are asked.
    sys.meta_path.insert(0, finder)
    try:
        where = OnTheCpu() if finder.ours else nullcontext()
        with as_python(), uncompiled():
            if prefer == "ours":
                _patch_loaded(report)
            for module in list(before.values()):
                finder.look_at(module, undo=True)
            with where, _naming_missed(report):
                yield report
        if named:
            raise ValueError(
                f"scans={', '.join(named)}: no module of that name was imported; write it as "
                "Python imports it, such as models.block:Mixer.scan"
            )
    finally:
        sys.meta_path.remove(finder)
        _forget(before)
        report.restore()


@contextmanager
def _naming_missed(report: UpstreamReport) -> Iterator[None]:
    """Add the imports that failed before to an error: a `try` of the user's may hide its cause."""
    try:
        yield
    except (UnsupportedError, ValueError) as error:
        told = str(error)
        # What is called like a scan, or takes the operands of one, is most likely the one missed.
        if isinstance(error, NoScanError) and (left := _left(report)):
            told += f" ({'; '.join(left)})"
        if report.missed:
            missed = ", ".join(dict.fromkeys(report.missed[-5:]))
            told += f" (imports that failed before: {missed}; install what is missing, or "
            told += "give its folder with --path)"
        error.args = (told, *error.args[1:])
        raise


def _left(report: UpstreamReport) -> list[str]:
    return [note for note in report.notes if note.endswith("left as it is")]


class _Finder(MetaPathFinder):
    """Finds the modules of the tables, and looks at every other module once it is executed."""

    def __init__(self, prefer: str, report: UpstreamReport, scans: dict[str, Signature]) -> None:
        self.ours = prefer == "ours"
        self._report = report
        self._scans = scans  # those whose module has not been imported yet

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
            loader = _ProvidingLoader(names, self._report.missed)
            spec = ModuleSpec(fullname, loader, is_package=True)
            is_own = _canonical(fullname) in _OWN_PATH
            spec.submodule_search_locations = list(own) if is_own else []
            return spec
        if real is None:
            self._miss(fullname)
        elif isinstance(real.loader, importlib.machinery.SourceFileLoader):
            self._watch(fullname, real.loader)
        return real

    def _miss(self, fullname: str) -> None:
        """Remember a module that is not there: the code that asks may hide that."""
        asker = _asker()
        if asker is None or _of_an_import_list():
            return
        # Python's own files and installed packages try for what other systems have.
        others = _is_installed(asker.f_code.co_filename) or _package(asker) in _NEIGHBOURS
        if not others:
            where = f"{asker.f_globals.get('__name__')}, line {asker.f_lineno}"
            self._report.missed.append(f"{fullname} ({where})")

    def _names(self, fullname: str, real: ModuleSpec | None) -> dict[str, Any] | None:
        """What to provide as a module; None to leave it to the other finders."""
        name = _canonical(fullname)
        # A file that a repository merely calls causal_conv1d.py is no copy of the package.
        if (
            name != fullname
            and name in _VENDORED
            and not (real and real.submodule_search_locations)
        ):
            return None
        if self.ours:
            for table in (FUNCTIONS, AROUND):
                if name in table:
                    return table[name]
            if name in SHELLS and not _installed("mmcv"):
                return SHELLS[name]
            if (found := compiled(name)) is not None:
                return found
        # A folder without __init__.py has no names: what is meant lies below it, and is compiled.
        if real is not None and (real.origin is not None or not PACKAGES.get(name)):
            return None
        for table in (PACKAGES, FUNCTIONS, AROUND):
            if name in table:
                return table[name]
        root = name.partition(".")[0]
        # Never a part of an installed package: a timm that has no such module must say so itself.
        absent = name == root or isinstance(sys.modules.get(root), Provided)
        asker = _asker()
        if root not in ABSENT or not absent or _package(asker) in _NEIGHBOURS:
            return None
        # Installed packages, such as transformers, do without it where it is not there.
        if root == "torchvision" and asker and _is_installed(asker.f_code.co_filename):
            return None
        # Of `from timm.layers import x`, x is a name, unless it is a module that has names.
        return STAND_INS.get(name, None if _of_an_import_list() else {})

    def _watch(self, name: str, loader: Any) -> None:
        """Look at the module after it has run; what is installed and fails to load is provided."""
        execute = loader.exec_module
        root = _canonical(name).partition(".")[0]
        names = FUNCTIONS.get(_canonical(name), AROUND.get(_canonical(name)))

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
                _hide_looked_for()
            self.look_at(module, undo=False)

        loader.exec_module = run

    def look_at(self, module: ModuleType, *, undo: bool) -> None:
        """Replace the scans and walks that a module of the user's defines.

        Args:
            module: has run.
            undo: whether it was there before, and gets back what it had.
        """
        name = str(getattr(module, "__name__", "vssm"))
        theirs = not self.ours and _canonical(name).partition(".")[0] in _ROOTS
        if name == _COMPILER and self.ours:
            _patch_compiler(module, self._report)
        if name.partition(".")[0] in _NEIGHBOURS | {"vssm"} or theirs:
            return
        for place in [p for p in self._scans if p.partition(":")[0] == name]:
            _patch_named(module, place, self._scans.pop(place), self._report, undo=undo)
        _patch_by_name(module, self._report, undo=undo)
        _patch_scans(module, self._report, undo=undo)
        _patch_tensor_classes(module, self._report, undo=undo)


class _ProvidingLoader(Loader):
    """Makes a `Provided` module."""

    def __init__(self, names: dict[str, Any], missed: list[str]) -> None:
        self._names, self._missed = names, missed

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, with its names."""
        return Provided(
            spec.name,
            self._names,
            list(spec.submodule_search_locations or []),
            lenient=spec.name.partition(".")[0] in ABSENT,
            missed=self._missed,
        )

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


def _asker() -> FrameType | None:
    """The frame whose code imports, behind those of Python's machinery and of ours."""
    frame = inspect.currentframe()
    while frame is not None and _package(frame) in _IMPORTERS:
        frame = frame.f_back
    return frame


def _package(frame: FrameType | None) -> str:
    """The package that a frame's code belongs to."""
    return "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _of_an_import_list() -> bool:
    """Whether Python looks for a module under a name that stands behind `from package import`."""
    frame = inspect.currentframe()
    while frame is not None and _package(frame) in _IMPORTERS:
        if frame.f_code.co_name == "_handle_fromlist":
            return True
        frame = frame.f_back
    return False


def _is_installed(file: str) -> bool:
    """Whether a file is of Python itself or of a package that pip put where it lies."""
    folders = (path for path in sys.path if path and file.startswith(path + os.sep))
    return file.startswith(_INSTALLED) or _has_packages(max(folders, key=len, default=""))


@functools.cache
def _has_packages(folder: str) -> bool:
    return bool(folder) and any(Path(folder).glob("*.dist-info"))


def _hide_looked_for() -> None:
    """Files that were just imported hold the stand-in; torch would take it for the real one."""
    # Their parts are there with them alone, and this is asked after every import.
    if not any(isinstance(sys.modules.get(root), Provided) for root in LOOKED_FOR):
        return
    for name in list(sys.modules):
        if name.partition(".")[0] in LOOKED_FOR and isinstance(sys.modules[name], Provided):
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
    """Replace the walks that a repository's own file defines, if name and arguments are known."""
    names = getattr(module, "__dict__", {})
    for title, (function, arguments, sizes) in BY_NAME.items():
        name, _, method = title.partition(".")
        found = names.get(name)
        # Only where it is defined: names that were imported from there are replaced with it.
        if found is None or getattr(found, "__module__", None) != module.__name__:
            continue
        # Another class of that name: its `apply` has nothing to do with autograd.
        if method and not _is_class(found, Function):
            continue
        # `apply` itself takes anything; what it passes on is forward's arguments behind ctx.
        given = signatures.parameters(found.forward if method else found)[bool(method) :]
        place = f"{module.__name__}.{title}"
        if given != arguments:
            report.notes.append(f"{place} takes {given}, not {arguments}: left as it is")
            continue
        theirs = found.apply if method else found
        same = signatures.computes_the_same(theirs, function, sizes)
        # A class is plain PyTorch, and fails on walks of another number alone. Of the functions,
        # whose six arguments nothing else has, copies ask for a GPU.
        if same is False or (method and not same):
            report.notes.append(f"{place} walks otherwise than VMamba's: left as it is")
            continue
        _replace_everywhere(found, module, method, function, report, undo=undo)


def _patch_named(
    module: ModuleType, place: str, signature: Signature, report: UpstreamReport, *, undo: bool
) -> None:
    """Replace the scan that the user named."""
    *path, name = place.partition(":")[2].split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    found = getattr(owner, name, None)
    if not callable(found):
        raise ValueError(  # noqa: TRY004 - the name is wrong, not a type
            f"scans={place!r}: {module.__name__} defines no such function; name what its file "
            "defines, such as models.block:selective_scan or models.block:Mixer.scan"
        )
    if _is_class(found, Function):
        ours = signature.adapt(found.forward, skip=_contexts(found))
        _replace_everywhere(found, module, "apply", ours, report, undo=undo)
    elif isinstance(owner, type) and not isinstance(vars(owner).get(name), staticmethod):
        ours = signature.adapt(found, skip=1)
        _replace(report, owner, name, lambda self, *o, **named: ours(*o, **named), undo=undo)
    else:
        _replace_everywhere(found, module, "", signature.adapt(found), report, undo=undo)


def _patch_scans(module: ModuleType, report: UpstreamReport, *, undo: bool) -> None:
    """Replace the selective scans that a module defines, known by what they take and compute."""
    for found in list(getattr(module, "__dict__", {}).values()):
        if getattr(found, "__module__", None) != getattr(module, "__name__", None):
            continue
        if _is_class(found, Function):
            # Torch gives every Function the same `apply`.
            _patch_function(found, module, "apply", report, undo=undo)
        elif isinstance(found, type):
            _patch_methods(found, report, undo=undo)
        elif isinstance(found, FunctionType):
            _patch_function(found, module, "", report, undo=undo)


def _patch_function(
    found: Any, module: ModuleType, method: str, report: UpstreamReport, *, undo: bool
) -> None:
    """Replace a function, or a Function's `apply`, by our scan if it is one."""
    plain = found.forward if method else found
    skip = _contexts(found) if method else 0
    place = f"{module.__name__}.{found.__qualname__}"
    by_name, is_scan = None, None
    if signatures.is_named_scan(signatures.parameters(plain)[skip:]):
        theirs = found.apply if method else found
        is_scan = signatures.computes_a_scan(theirs, plain, skip=skip)
        by_name = None if is_scan is False else Signature().adapt(plain, skip=skip)
    if not is_scan and signatures.may_be_scan(plain, skip=skip):
        plain = plain if method else _copied(plain)
        theirs = _twin(found).apply if method else plain
        settled = _noting(report, place)
        ours = signatures.proving(theirs, plain, skip=skip, by_name=by_name, settled=settled)
    elif by_name is not None:
        ours = by_name
    else:
        return
    _replace_everywhere(found, module, method, ours, report, undo=undo)


def _contexts(function: type[Function]) -> int:
    """How many parameters a Function's `forward` has in front of the operands: its `ctx`, or none.

    Newer ones set their context up in a method of its own.
    """
    return int(function.setup_context is Function.setup_context)


def _twin(function: type[Function]) -> type[Function]:
    """The same Function, which stays as it is when the user's is replaced."""
    made: Any = type(function)
    twin: type[Function] = made(function.__name__, function.__bases__, dict(vars(function)))
    return twin


def _copied(function: FunctionType) -> FunctionType:
    """The same function, which stays as it is when the user's is redirected."""
    parts = (function.__name__, function.__defaults__, function.__closure__)
    twin = FunctionType(function.__code__, function.__globals__, *parts)
    twin.__kwdefaults__ = function.__kwdefaults__
    vars(twin).update(vars(function))
    return twin


def _patch_methods(owner: type, report: UpstreamReport, *, undo: bool) -> None:
    """Let the methods of a class that may be scans prove it, when they are first called."""
    for name, entry in list(vars(owner).items()):
        method = entry.__func__ if isinstance(entry, staticmethod | classmethod) else entry
        skip = int(not isinstance(entry, staticmethod))
        if not isinstance(method, FunctionType) or not signatures.may_be_scan(method, skip=skip):
            continue
        plain = _copied(method)
        settled = _noting(report, f"{owner.__module__}.{owner.__qualname__}.{name}")
        ours = signatures.proving(plain, plain, skip=skip, settled=settled)
        _redirect(method, ours, report, undo=undo)


def _is_class(found: object, base: type) -> bool:
    # list[int] says of itself that it is a type, and issubclass then refuses it.
    return issubclass(type(found), type) and issubclass(cast(type, found), base)


def _patch_tensor_classes(module: ModuleType, report: UpstreamReport, *, undo: bool) -> None:
    """Let subclasses of Tensor that only spell its properties otherwise give the tensor itself.

    Repositories have them so that `shape` is a tuple of Python's numbers, for Triton. A trace and
    the reference have tensors of their own kinds, of which torch makes no such subclass.
    """
    for found in list(getattr(module, "__dict__", {}).values()):
        if not _is_class(found, Tensor):
            continue
        if found.__module__ != module.__name__ or found.__bases__ != (Tensor,):
            continue
        own = {name: value for name, value in vars(found).items() if name not in _OF_ANY_CLASS}
        # What it does beside that would be lost.
        if all(isinstance(v, property) and hasattr(Tensor, name) for name, v in own.items()):
            _replace(report, found, "__new__", staticmethod(lambda cls, x: x), undo=undo)


def _patch_compiler(module: ModuleType, report: UpstreamReport) -> None:
    """Let files that compile CUDA code as they are imported load without a compiler for it."""
    for function in ("load", "load_inline"):
        real = getattr(module, function)

        def load(name: str, sources: Any = (), *args: Any, real: Any = real, **options: Any) -> Any:
            files = [str(s) for s in ([sources] if isinstance(sources, str) else sources)]
            if options.get("cuda_sources") or any(f.endswith((".cu", ".cuh")) for f in files):
                report.provided.append(name)
                return Compiled(name)
            return real(name, sources, *args, **options)

        report.replace(module, function, load)


def _noting(report: UpstreamReport, place: str) -> Callable[[bool], None]:
    def settled(is_scan: bool) -> None:
        told = "computes our scan" if is_scan else "does not compute a scan: left as it is"
        if (note := f"{place} {told}") not in report.notes:
            report.notes.append(note)

    return settled


def _replace_everywhere(
    found: Any,
    module: ModuleType,
    method: str,
    ours: Any,
    report: UpstreamReport,
    *,
    undo: bool,
) -> None:
    """Replace what `module` defines wherever it is held, or a method of it in its class."""
    if method:
        # `scan = Scan.apply` of a module is bound to torch's own, which calls `forward`.
        skip = _contexts(found)
        _put(report, found, "forward", staticmethod(lambda *o: ours(*o[skip:])), undo=undo)
        _replace(report, found, method, staticmethod(ours), undo=undo)
        return
    if isinstance(found, FunctionType):
        _redirect(found, ours, report, undo=undo)
        return
    # A file that was loaded by its path alone is not in sys.modules.
    for other in {id(m): m for m in (module, *sys.modules.values())}.values():
        for key, value in list(getattr(other, "__dict__", {}).items()):
            if value is found:
                _replace(report, other, key, ours, undo=undo)


def _redirect(found: FunctionType, ours: Any, report: UpstreamReport, *, undo: bool) -> None:
    """Let a function of the user's run ours.

    By what it executes, not by its names: tables, partials and defaults hold it as well.
    """
    signature = inspect.signature(found)
    # As many free variables as its closure has: Python takes no other code for it.
    code = _calling_ours.__code__.replace(co_freevars=found.__code__.co_freevars)
    _put(report, found, "__signature__", signature, undo=undo)
    _put(report, found, "__kwdefaults__", {"_vssm_ours": ours}, undo=undo)
    _put(report, found, "__code__", code, undo=undo)
    report.patched.append(f"{found.__module__}.{found.__qualname__}")


def _calling_ours(*args: Any, _vssm_ours: Any, **kwargs: Any) -> Any:
    return _vssm_ours(*args, **kwargs)


def _replace(report: UpstreamReport, owner: Any, name: str, ours: Any, *, undo: bool) -> None:
    kept = list(report._undo)
    report.replace(owner, name, ours)
    if not undo:  # first imported inside: it never had another
        report._undo[:] = kept


def _put(report: UpstreamReport, owner: Any, name: str, value: Any, *, undo: bool) -> None:
    """Set an attribute that the report need not name."""
    if undo:
        # Of a class the raw entry; what a function is made of is no entry of it.
        found = vars(owner).get(name, _INHERITED) if isinstance(owner, type) else None
        before = getattr(owner, name, _INHERITED) if found is None else found
        report._undo.append((owner, name, before))
    setattr(owner, name, value)


def _canonical(name: str) -> str:
    """The upstream name of a module, also where a repository carries its package as its own."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part in _VENDORED), 0)
    return ".".join(parts[start:])


def _forget(before: dict[str, ModuleType]) -> None:
    """Take out what was imported of the upstream packages, and put back what was there."""
    for name in list(sys.modules):
        # An installed package's own files go as well: they hold our functions, and a later import
        # has to give theirs.
        provided = isinstance(sys.modules[name], Provided)
        upstreams = _canonical(name).partition(".")[0] in _ROOTS
        if (provided or upstreams) and name not in before:
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            # A package that was there before has its submodules as attributes too.
            if parent in before and vars(before[parent]).get(child) is module:
                delattr(before[parent], child)
