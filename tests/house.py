"""The import arrows of exporter/ as a table, and functions that return what breaks them."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "exporter"


@dataclass(frozen=True)
class Layer:
    """Some files of exporter/ and the layers below that they may import, besides each other."""

    name: str
    side: str  # shared: both sides may see it; making: torch; running: arrays only; top: sees both
    files: tuple[str, ...]  # globs below exporter/, without .py
    sees: tuple[str, ...]


_SHARED = ("leaves", "documents")
_MODELS = (*_SHARED, "oracle", "operators", "pruning", "checkpoint", "models")
_RUNTIMES = (*_SHARED, "preprocessing", "graph edits", "runtimes")
_REPORTS = (*_RUNTIMES, "reports", "machine", "pages", "bundle")
_DYNAMIC = "<a name computed at run time>"
# From the bottom up. A file that no row names, or two rows do, fails the test.
LAYERS = (
    Layer(
        "leaves",
        "shared",
        ("__init__", "_version", "errors", "idle_options", "spec", "schedule", "native_library"),
        (),
    ),
    Layer("documents", "shared", ("files", "json_*", "manifest*", "artifact*"), ("leaves",)),
    Layer("oracle", "making", ("reference",), ("leaves",)),
    Layer("operators", "making", ("ops*",), ("leaves", "oracle")),
    Layer("pruning", "making", ("pruning", "walks"), ("leaves", "oracle", "operators")),
    Layer("checkpoint", "making", ("checkpoint*", "unpickle*", "pickle_*"), _SHARED),
    Layer("models", "making", ("models/*", "flops"), _MODELS[:-1]),
    Layer("graph", "making", ("onnx_bod*", "onnx_schemas", "onnx_passes"), ("leaves",)),
    Layer("export", "making", ("onnx_export*", "export_*"), (*_MODELS, "graph")),
    Layer("compat", "making", ("compat/*",), (*_MODELS, "graph", "export")),
    Layer("preprocessing", "running", ("preprocessing",), _SHARED),
    Layer("graph edits", "running", ("graph_edit",), _SHARED),
    Layer("runtimes", "running", ("runtimes/*", "doctor"), (*_SHARED, "graph edits")),
    Layer("reports", "running", ("parity*", "benchmark*"), _RUNTIMES),
    Layer("machine", "running", ("machine",), (*_RUNTIMES, "reports")),
    Layer("pages", "running", ("tables", "*_page"), (*_RUNTIMES, "reports")),
    Layer(
        "evaluation",
        "running",
        ("training/__init__", "training/evaluate*"),
        (*_RUNTIMES, "preprocessing"),
    ),
    Layer(
        "augmentation",
        "running",
        ("training/recipe", "training/request", "training/augment*"),
        (*_SHARED, "preprocessing"),
    ),
    Layer("explaining", "making", ("training/visualize*",), _MODELS),
    Layer("ablation", "making", ("training/ablate*",), _MODELS),
    Layer("bundle", "running", ("bundle*",), (*_RUNTIMES, "reports")),
    Layer("torch session", "top", ("torch_session",), (*_MODELS, *_REPORTS, "compat")),
    Layer(
        "subjects",
        "top",
        ("bench_subjects*", "bench_engine"),
        (*_MODELS, *_REPORTS, "export", "torch session"),
    ),
    Layer(
        "training",
        "top",
        ("training/finetune*",),
        (*_MODELS, *_RUNTIMES, "evaluation", "augmentation", "ablation"),
    ),
    Layer(
        "pipeline",
        "top",
        ("pipeline*",),
        (
            *(*_MODELS, *_REPORTS, "evaluation", "explaining", "ablation", "augmentation"),
            *("training", "export", "compat", "torch session", "subjects"),
        ),
    ),
    Layer(
        "command line",
        "top",
        ("cli*",),
        (
            *(*_SHARED, "runtimes", "reports", "pages"),
            *("evaluation", "explaining", "ablation", "augmentation", "bundle", "pipeline"),
        ),
    ),
)
_UNLISTED = Layer("no layer", "none", (), ())
# Who may import a heavy package: its import names, then globs as above.
_TORCH = ("torch", "torchvision", "safetensors.torch")
HEAVY = {
    _TORCH: (
        *("reference", "ops*", "pruning", "walks", "models/*", "checkpoint*", "unpickle*"),
        *("pickle_*", "onnx_export*", "torch_session", "bench_subjects", "compat/*"),
        *("pipeline_module", "training/finetune*", "training/visualize*", "training/ablate*"),
    ),
    ("onnx", "onnx_ir", "onnxscript"): (
        *("onnx_*", "export_*", "graph_edit", "parity*", "machine", "bench_subjects*"),
        "compat/module_export",
    ),
    ("onnxruntime",): ("runtimes/ort*", "machine", "bench_subjects"),
    ("tensorrt", "tensorrt_rtx"): ("runtimes/tensorrt*",),
    ("cuda",): ("runtimes/cuda*",),
}


@dataclass(frozen=True)
class Import:
    """One imported name, resolved to a module of the package where it is one."""

    line: int
    name: str


def package_sources(root: Path = ROOT) -> dict[str, str]:
    """Text of every exporter/**/*.py by its path below exporter/, without .py."""
    folder = root / PACKAGE
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def package_imports(sources: Mapping[str, str]) -> dict[str, list[Import]]:
    """Every import of every file, those inside functions too."""
    return {file: list(_imports(file, ast.parse(text))) for file, text in sources.items()}


def dotted(file: str) -> str:
    """The module of a file, given as `package_sources` does."""
    return ".".join(part for part in (PACKAGE, *file.split("/")) if part != "__init__")


def unlisted_files(files: Iterable[str]) -> list[str]:
    """Files that no layer names, or more than one."""
    rows = {file: [layer.name for layer in LAYERS if _matches(file, layer.files)] for file in files}
    return [
        f"{PACKAGE}/{file}.py is in layers {names}; LAYERS of tests/house.py must give it one"
        for file, names in rows.items()
        if len(names) != 1
    ]


def wrong_arrows(imports: Mapping[str, list[Import]]) -> list[str]:
    """Imports that go up, across, or over to the other side."""
    found = []
    for file, names in imports.items():
        layer = layer_of(file)
        for item in names:
            target = _file(item.name, imports)
            own = item.name == PACKAGE or item.name.rpartition(".")[2].startswith("__")
            if (target == "__init__" and not own) or (item.name == _DYNAMIC and file != "__init__"):
                found.append(f"{PACKAGE}/{file}.py:{item.line} hides what it imports: {item.name}")
            if target in (None, "__init__"):
                continue
            below = layer_of(target).name
            if below not in (layer.name, *layer.sees):
                found.append(
                    f"{PACKAGE}/{file}.py:{item.line} ({layer.name}) imports {item.name} ({below})"
                )
    return found


def import_cycles(imports: Mapping[str, list[Import]]) -> list[str]:
    """One cycle of files that import each other, if there is any."""
    graph = {
        file: {t for item in names if (t := _file(item.name, imports)) and t != file}
        for file, names in imports.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def heavy_imports(imports: Mapping[str, list[Import]]) -> list[str]:
    """Imports of torch, onnx, onnxruntime or tensorrt in files that are not named for them."""
    return [
        f"{PACKAGE}/{file}.py:{item.line} imports {item.name}, which is for {', '.join(files)}"
        for file, names in imports.items()
        for item in names
        for packages, files in HEAVY.items()
        if any(_within(item.name, p) for p in packages) and not _matches(file, files)
    ]


def torch_behind(imports: Mapping[str, list[Import]]) -> list[str]:
    """Shared or running-side files that reach torch, with the chain of files."""
    found = []
    for start in imports:
        if layer_of(start).side not in ("shared", "running"):
            continue
        chains = {start: start}
        queue = [start]
        while queue:
            file = queue.pop()
            for item in imports[file]:
                if any(_within(item.name, p) for p in _TORCH):
                    found.append(f"{chains[file]} -> {item.name}")
                for target in _executed(item.name, imports):
                    if target not in chains:
                        chains[target] = f"{chains[file]} -> {target}"
                        queue.append(target)
    return found


def undeclared_packages(imports: Mapping[str, list[Import]], declared: Iterable[str]) -> list[str]:
    """Imports of packages that are neither standard nor among `declared` (import names)."""
    known = {*sys.stdlib_module_names, PACKAGE, *declared, _DYNAMIC}  # arrows judge the last
    return [
        f"{PACKAGE}/{file}.py:{item.line} imports {item.name}, which pyproject.toml does not list"
        for file, names in imports.items()
        for item in names
        if item.name.partition(".")[0] not in known
    ]


def layer_of(file: str) -> Layer:
    """The layer of a file, given as `package_sources` does."""
    return next((row for row in LAYERS if _matches(file, row.files)), _UNLISTED)


def _imports(file: str, tree: ast.Module) -> Iterator[Import]:
    """Absolute dotted names; `from a import b` gives a.b. import_module and exporter.name count."""
    here = dotted(file).split(".") + ([""] if file.endswith("__init__") else [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).strip(".")
            yield from (Import(node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == PACKAGE:
            yield Import(node.lineno, f"{PACKAGE}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            literals = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield Import(node.lineno, str(literals[0]) if literals else _DYNAMIC)


def _executed(name: str, files: Iterable[str]) -> list[str]:
    """Files of the package that importing `name` runs, the outermost first."""
    parts = name.split(".")
    prefixes = {".".join(parts[: i + 1]): i for i in range(len(parts))}
    found = [(prefixes[dotted(file)], file) for file in files if dotted(file) in prefixes]
    return [file for _, file in sorted(found)]


def _file(name: str, files: Iterable[str]) -> str | None:
    """The file of the package that `name` is, or is defined in."""
    return next(reversed(_executed(name, files)), None)


def _matches(file: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(file, glob) for glob in globs)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
