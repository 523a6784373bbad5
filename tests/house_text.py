"""Rules of the house about one file's text; each function returns what breaks its rule."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "exporter"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
_EXAMPLES_MAY_IMPORT = frozenset(
    {"PIL", "matplotlib", "numpy", "rich", "safetensors", "sklearn", "torch", "typer"}
)
_CXX_SEES = {
    "kernels": ("kernels",),
    "c": ("kernels", "c"),
    "onnxruntime": ("kernels", "onnxruntime"),
    "tensorrt": ("kernels", "tensorrt"),
    "benchmarks": ("kernels",),
    "tests": ("kernels", "tensorrt"),
}
# Headers with a dot in angle brackets (the standard library's have none), by house.
_CXX_HEADERS = {
    "kernels": r"(\w*intrin|arm_neon|cpuid|cuda\w*|ucontext|unistd|(sys|sanitizer)/\w+)\.h",
    "c": r"std(def|int)\.h",
    "onnxruntime": r"(onnxruntime_\w+|cuda\w*|dlfcn)\.h",
    "tensorrt": r"(Nv\w+|cuda\w*|dlfcn|link)\.h",
    "benchmarks": r"cuda\w*\.h",
    "tests": r"dlfcn\.h",
}
_CLOSE = frozenset({"allclose", "assert_allclose", "assert_close", "isclose"})


def long_python(name: str, text: str) -> list[str]:
    """A file or functions that are too long; a function's docstring is not counted."""
    spans = [
        (node.name, node.lineno, _last_line(node) - _docstring_lines(node))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return _too_long(name, text, spans)


def long_cxx(name: str, text: str) -> list[str]:
    """The same for C++ and CUDA."""
    return _too_long(name, text, cxx_functions(text))


def cxx_functions(text: str) -> list[tuple[str, int, int]]:
    """Name, first and last line of the functions defined in namespaces and classes.

    A reading of braces, not of C++: enough for formatted code without macros that open blocks.
    """
    noise = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:\\\n|[^\n])*'
    code = re.sub(noise, _blank, text, flags=re.DOTALL | re.MULTILINE)
    found: list[tuple[str, int, int]] = []
    open_blocks: list[tuple[str, int]] = []  # kind or function name, first line
    start = 0
    for match in re.finditer(r"[;{}]", code):
        header = re.sub(
            r"\b(public|protected|private)\s*:(?!:)", _blank, code[start : match.start()]
        )
        inside = any(kind != "scope" for kind, _ in open_blocks)
        if match[0] == "{":
            first = code.count("\n", 0, match.start() - len(header.lstrip())) + 1
            open_blocks.append(("block" if inside else _block_kind(header), first))
        elif match[0] == "}" and open_blocks:
            kind, first = open_blocks.pop()
            if kind not in ("scope", "block"):
                found.append((kind, first, code.count("\n", 0, match.start()) + 1))
        start = match.end()
    return found


def cxx_arrows(name: str, text: str) -> list[str]:
    """Includes of `name` (a path from the root) that its house may not have."""
    house = Path(name.removeprefix("plugins/")).parts[0]
    if house not in _CXX_SEES:
        return [f"{name}: {house} is no house; known are {', '.join(_CXX_SEES)}"]
    found = []
    for bracket, target in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', text, re.MULTILINE):
        if target.startswith("plugins/"):
            allowed = bracket == '"' and target.split("/")[1] in _CXX_SEES[house]
        elif target.startswith("tests/"):
            allowed = bracket == '"' and house == "tests"
        else:
            standard = "." not in target and "/" not in target
            allowed = bracket == "<" and bool(standard or re.fullmatch(_CXX_HEADERS[house], target))
        if not allowed:
            found.append(f"{name} includes {target}")
    return found


def compile_alone(header: str, folder: Path) -> str:
    """What the compiler says of a file with nothing but this include; empty when it is content."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = ["-std=c++17", "-fsyntax-only", f"-I{folder}", "-x", "c++", "-"]
    source = f'#include "{header}"\n'
    done = subprocess.run(
        [*compiler.split(), *flags], input=source, capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


def example_imports(
    name: str, text: str, *, public: Iterable[str], own: Iterable[str]
) -> list[str]:
    """Imports of an example beyond `exporter`'s public names and the packages it may use."""
    public, tree = set(public), ast.parse(text)
    may = {*sys.stdlib_module_names, *_EXAMPLES_MAY_IMPORT, *own, PACKAGE}
    used: list[tuple[int, str]] = []
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            used += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used += [(node.lineno, node.attr)] if node.value.id == PACKAGE else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for item, alias in _named(node):
                package, dot, _ = item.partition(".")
                if package not in may or (package == PACKAGE and (dot or alias)):
                    found.append(f"{name}:{node.lineno} imports {item}")
    hidden = [(line, attribute) for line, attribute in used if attribute not in public]
    return found + [f"{name}:{line} uses {PACKAGE}.{a}, no public name" for line, a in hidden]


def bare_allclose(name: str, text: str) -> list[str]:
    """Calls of allclose and its like that leave the tolerance to a default."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        given = any(k.arg in (None, "rtol", "atol", "rel_tol", "abs_tol") for k in node.keywords)
        if called in _CLOSE and not given:
            found.append(f"{name}:{node.lineno} calls {called} without a tolerance")
    return found


def _too_long(name: str, text: str, spans: Iterable[tuple[str, int, int]]) -> list[str]:
    lines = text.count("\n")
    found = [f"{name} has {lines} lines, over {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    return found + [
        f"{name}:{first} {function} has {last - first + 1} lines, over {MAX_FUNCTION_LINES}"
        for function, first, last in spans
        if last - first + 1 > MAX_FUNCTION_LINES
    ]


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return _last_line(node.body[0]) - node.body[0].lineno + 1


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _block_kind(header: str) -> str:
    """ "scope" for a namespace or class, "block" for an initialiser, else the function's name."""
    head = re.sub(r"operator\s*\S+?(?=\()", "operator_", header)
    before, parenthesis, _ = head.partition("(")
    if "=" in re.sub(r"<[^<>]*>", "", before):
        return "block"
    if parenthesis and not re.search(r"\b(enum|namespace)\b", before):
        return str((re.findall(r"[\w~]+", before) or ["?"])[-1])
    scope = re.search(r"\b(namespace|class|struct|union|extern)\b|^\s*$", head)
    return "scope" if scope else "block"


def _named(node: ast.Import | ast.ImportFrom) -> list[tuple[str, str | None]]:
    """What is imported, and under which other name a whole module is."""
    if isinstance(node, ast.Import):
        return [(alias.name, alias.asname) for alias in node.names]
    return [("." * node.level + (node.module or ""), None)]
