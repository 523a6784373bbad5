"""A model from the user's own repository: path:factory, imported and called.

Importing runs the user's code; whoever names the repository trusts it.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import vssm
from vssm.errors import MissingPackageError, UnsupportedError, did_you_mean, reason
from vssm.extras import explain_missing

_REMEDY: Final = "; name a factory of that module, as in repo/model.py:build"
_NOT_THEIRS: Final = tuple(
    [*(sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib")), "<frozen "]
    + [str(Path(module.__file__ or "").parent) for module in (torch, vssm)]
)


def build_from(target: str, options: Mapping[str, Any]) -> nn.Module:
    """The module that `target` makes, inside `search_path` of it.

    Args:
        target: "FILE.py:factory", "PACKAGE:module.factory" or "DIRECTORY:module.factory"; the
            factory a function or class that returns a torch module.
        options: its keyword arguments.

    Raises:
        ValueError: the target is malformed, or there is no such file or factory, or another module
            of that name is imported.
        TypeError: what has the factory's name cannot be called, or is a model already.
        MissingPackageError: the user's code imports a package that one of our extras brings.
        UnsupportedError: what it makes is no torch module, or the user's code fails.
    """
    folder, module, factory = _resolve(target)
    try:
        with explain_missing():
            function = pkgutil.resolve_name(f"{module}:{factory}")
    # Ahead of `except Exception`, which would hide the command that installs the package.
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(
            f"target={target!r}: importing {module} needs {error.name!r}, which is not found; "
            "install it, or give its folder with --path DIR"
        ) from error
    except AttributeError as error:
        if module in sys.modules:  # it ran, and has no such name
            _check_place(target, module, folder)
            close = did_you_mean(factory, _factories(sys.modules[module]))
            raise ValueError(f"target={target!r}: {error}{close or _REMEDY}") from error
        raise UnsupportedError(f"target={target!r}: importing {module}: {said(error)}") from error
    except (Exception, SystemExit) as error:
        raise UnsupportedError(f"target={target!r}: importing {module}: {said(error)}") from error
    _check_place(target, module, folder)
    if not callable(function) or isinstance(function, nn.Module):
        raise TypeError(
            f"target={target!r}: {factory} is a {type(function).__name__}, not a function or class "
            f"that makes the model{_REMEDY}"
        )
    try:
        model = function(**options)
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and not _takes(function, options, str(error)):
            raise ValueError(
                f"target={target!r} called with {sorted(options)}: {error}; give its arguments "
                "with --set KEY=VALUE"
            ) from error
        raise UnsupportedError(
            f"target={target!r} called with {sorted(options)}: {said(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"target={target!r} returns {type(model).__name__}, not a torch.nn.Module; name a "
            "function or class that returns the model"
        )
    return model


def _factories(module: Any) -> list[str]:
    """What a module defines that can be called."""
    found = ((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    return [n for n, v in found if callable(v) and getattr(v, "__module__", "") == module.__name__]


def _takes(function: Any, options: Mapping[str, Any], said: str) -> bool:
    """Whether these are arguments of the factory, and its TypeError is about something else."""
    # A factory that hands on **options learns only deep inside that one of them is not known.
    unknown = re.search(r"unexpected keyword argument '(\w+)'", said)
    if unknown and unknown[1] in options:
        return False
    try:
        inspect.signature(function).bind(**options)
    except TypeError:
        return False
    except ValueError:  # no signature, as of some classes that are written in C
        return True
    return True


@contextmanager
def search_path(target: str, further: Sequence[Path] = ()) -> Iterator[None]:
    """Let imports find the target's folder first, then `further`; undone at the end.

    Raises:
        ValueError: the target is malformed, or a folder does not exist.
    """
    folder, _, _ = _resolve(target)
    for path in further:
        if not path.is_dir():
            raise ValueError(
                f"path={path} is not a directory; give the folder that holds a package"
            )
    added = [str(path.resolve()) for path in (folder, *further)]
    before = list(sys.path)
    # In front: the user's folder wins over an installed package of the same name.
    sys.path[:0] = added
    try:
        yield
    finally:
        # The list itself, which others hold, and whole: the user's code may have changed it too.
        sys.path[:] = before


def _check_place(target: str, module: str, folder: Path) -> None:
    """Another module of that name may have been imported before, and is not the user's."""
    file = getattr(sys.modules[module], "__file__", None)
    # Python answers an import from sys.modules, whatever the path says by now.
    if file is None or folder not in Path(file).resolve().parents:
        raise ValueError(
            f"target={target!r}: module {module} is already imported from {file}; rename the file, "
            "or run in a process of its own"
        )


def said(error: BaseException) -> str:
    """What the user's code raised, and where."""
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    # torch.export raises an error of its own where it has caught the one that has the user's line.
    while cause is not None and not frames:
        found = traceback.extract_tb(cause.__traceback__)
        # Python's `exit`, or torch, raises it; the line that called it is the one to look at.
        frames = [frame for frame in found if not frame.filename.startswith(_NOT_THEIRS)]
        cause = cause.__cause__ or cause.__context__
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in frames[-1:])
    if isinstance(error, SystemExit):
        return f"it ends the program{place}"
    return f"{reason(error)}{place}"


def _resolve(target: str) -> tuple[Path, str, str]:
    """(folder to import from, dotted module, factory) of a target."""
    # The last colon: a folder's name may have one.
    place, colon, name = target.rpartition(":")
    if not colon or not place or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"target={target!r} is not PATH:FACTORY; write for example repo/model.py:build, or "
            "repo:package.model.build"
        )
    path = Path(place).resolve()
    *inner, factory = name.split(".")
    if path.is_file() and path.suffix == ".py":
        # By its full dotted name: else the file's relative imports would fail.
        root, parts = _package_root(path.parent, [path.stem])
        return root, ".".join([*parts, *inner]), factory
    if not path.is_dir():
        raise ValueError(f"target={target!r}: {path} is neither a folder nor a .py file")
    root, parts = _package_root(path, [])
    if not parts and not inner:
        raise ValueError(
            f"target={target!r}: {path} is a folder without __init__.py; name the module in it "
            f"too, as in {place}:module.{factory}"
        )
    return root, ".".join([*parts, *inner]), factory


def _package_root(folder: Path, parts: list[str]) -> tuple[Path, list[str]]:
    """The folder above the outermost package that holds `folder`, and the dotted parts."""
    while (folder / "__init__.py").is_file():
        parts = [folder.name, *parts]
        folder = folder.parent
    return folder, parts
