"""The rules of the house over the real files, and for each rule something that breaks it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import house
import house_text
import packaging.requirements
import pytest

import exporter

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PUBLIC = exporter.__all__
SOURCES = house.package_sources()
IMPORTS = house.package_imports(SOURCES)
EMPTY = dict.fromkeys(SOURCES, "")
_IMPORT_NAMES = {"pillow": "PIL", "onnx-ir": "onnx_ir", "scikit-learn": "sklearn"}
# Brought along by a declared package that cannot be used without it.
_IMPLIED = {"typing_extensions", "click"}
# Optional, for a GPU, and large; the error where one is missing has the command that installs it.
_OPTIONAL = {"tensorrt", "tensorrt_rtx", "cuda"}
_OUTSIDE_TORCH = [
    house.dotted(file)
    for file in SOURCES
    if house.layer_of(file).side in ("shared", "running")
    or file.split("/")[0] in ("cli", "pipeline")
]


def _texts(*globs: str) -> dict[str, str]:
    return {
        path.relative_to(house.ROOT).as_posix(): path.read_text(encoding="utf-8")
        for glob in globs
        for path in sorted(house.ROOT.glob(glob))
        if "__pycache__" not in path.parts
    }


PYTHON = _texts("exporter/**/*.py", "examples/*.py")
CXX_FOLDERS = ("plugins", "benchmarks", "examples", "tests")
CXX = _texts(*(f"{d}/**/*.{e}" for d in CXX_FOLDERS for e in ("h", "cpp", "cuh", "cu")))
EXAMPLES = _texts("examples/*.py")
TESTS = _texts("tests/*.py")


def _nothing(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def _declared() -> set[str]:
    """Import names of pyproject.toml's dependencies, the optional ones for reports too."""
    project = tomllib.loads((house.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["reports"]]
    names = {packaging.requirements.Requirement(line).name for line in lines}
    return {_IMPORT_NAMES.get(name, name) for name in names} | _IMPLIED | _OPTIONAL


def test_layers_stand_on_lower_ones() -> None:
    names = [layer.name for layer in house.LAYERS]
    for number, layer in enumerate(house.LAYERS):
        assert set(layer.sees) <= set(names[:number]), layer


def test_every_file_has_one_layer() -> None:
    _nothing(house.unlisted_files(SOURCES))
    assert len(house.unlisted_files([*SOURCES, "helpers", "models/vim"])) == 1


def test_arrows() -> None:
    _nothing(house.wrong_arrows(IMPORTS))
    _nothing(house.import_cycles(IMPORTS))
    _nothing(house.torch_behind(IMPORTS))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("reference", "from exporter import ops"),
        ("ops", "def f():\n    from exporter.pruning import prune"),
        ("pruning", "import exporter.models.vim"),
        ("models/vim", "from ..onnx_export import export"),
        ("parity", "from exporter.models import create_model"),
        ("runtimes/ort", "from exporter import parity"),
        ("runtimes/ort", "import importlib\nimportlib.import_module('exporter.pipeline')"),
        ("runtimes/ort", "import importlib\nimportlib.import_module('exporter.' + name)"),
        ("parity", "from exporter import create_model"),
        ("parity", "import exporter\nexporter.export(model, 'out')"),
        ("errors", "from exporter.spec import DOMAIN\nimport exporter.files"),
        ("cli", "from exporter.onnx_export import export"),
    ],
)
def test_wrong_arrow_is_found(file: str, line: str) -> None:
    assert len(house.wrong_arrows(house.package_imports({**EMPTY, file: line}))) == 1


def test_cycle_is_found() -> None:
    loop = {"spec": "import exporter.errors", "errors": "import exporter.spec"}
    assert house.import_cycles(house.package_imports({**EMPTY, **loop})) != []


def test_torch_behind_the_running_side_is_found() -> None:
    sources = {**EMPTY, "schedule": "from exporter.errors import E", "errors": "import torch.nn"}
    found = house.torch_behind(house.package_imports(sources))
    assert "schedule -> errors -> torch.nn" in found


def test_heavy_packages() -> None:
    _nothing(house.heavy_imports(IMPORTS))
    _nothing(house.undeclared_packages(IMPORTS, _declared()))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("spec", "import torch"),
        ("parity", "from safetensors.torch import load_file"),
        ("ops", "def f():\n    import onnxscript"),
        ("cli", "import onnxruntime as ort"),
        ("runtimes/ort", "from tensorrt import Logger"),
    ],
)
def test_heavy_package_is_found(file: str, line: str) -> None:
    assert len(house.heavy_imports(house.package_imports({file: line}))) == 1


def test_undeclared_package_is_found() -> None:
    imports = house.package_imports(
        {"spec": "import json, numpy.linalg\nfrom pandas import Series"}
    )
    assert len(house.undeclared_packages(imports, _declared())) == 1


def _loaded(statements: str) -> set[str]:
    """Top-level modules that these statements add to a fresh interpreter."""
    code = (
        f"import sys; before = set(sys.modules)\n{statements}\n"
        "sys.stdout.write('\\n'.join({n.partition('.')[0] for n in set(sys.modules) - before}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=house.ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_needs_numpy_alone() -> None:
    foreign = {n for n in _loaded("import exporter") if n not in sys.stdlib_module_names}
    assert foreign <= {"exporter", "numpy"}
    assert "torch" in _loaded("import exporter; exporter.create_model")


def test_running_side_opens_without_torch() -> None:
    loaded = _loaded("import " + ", ".join(_OUTSIDE_TORCH))
    assert {"exporter", "onnx"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there(name: str) -> None:
    assert getattr(exporter, name) is not None


def test_sizes() -> None:
    found = [line for name, text in PYTHON.items() for line in house_text.long_python(name, text)]
    found += [line for name, text in CXX.items() for line in house_text.long_cxx(name, text)]
    _nothing(found)


@pytest.mark.parametrize("lines", [50, 51])
def test_long_function_is_found(lines: int) -> None:
    body = '    """Not counted.\n    """\n' + "    x = 1\n" * (lines - 1)
    python = f"class A:\n  async def f(self):\n{body}"
    statements = "  f(a, '{');  // }\n" * (lines - 3)
    cxx = (
        'namespace vssm {\nextern "C" {\ntemplate <typename T = int>\nclass A : public B<T> {\n'
        f" public:\n  int run(int a = 0) const noexcept\n  {{\n{statements}  }}\n}};\n}}\n}}\n"
    )
    assert house_text.cxx_functions(cxx) == [("run", 6, 5 + lines)]
    over = int(lines > house_text.MAX_FUNCTION_LINES)
    assert len(house_text.long_python("a.py", python)) == over
    assert len(house_text.long_cxx("a.h", cxx)) == over


def test_functions_of_cxx_are_told_from_other_blocks() -> None:
    text = """
    #define OPEN {
    const char* kText[] = {"{", "}"};
    struct Point { int x = 0; int size() const { return 1; } };
    enum class Kind { kOne };
    bool operator==(const Point& a, const Point& b) { if (a.x) { return true; } return false; }
    const auto kLambda = [](int x) { return x; };
    Point::~Point() {}
    """
    assert [name for name, *_ in house_text.cxx_functions(text)] == ["size", "operator_", "~Point"]


@pytest.mark.parametrize("lines", [300, 301])
@pytest.mark.parametrize("check", [house_text.long_python, house_text.long_cxx])
def test_long_file_is_found(lines: int, check: Callable[[str, str], list[str]]) -> None:
    assert len(check("a", "\n" * lines)) == int(lines > house_text.MAX_FILE_LINES)


def test_cxx_arrows() -> None:
    assert len(CXX) > 1
    # The examples belong to no house: they stand outside the checkout, in someone's program.
    ours = {name: text for name, text in CXX.items() if not name.startswith("examples/")}
    _nothing([line for name, text in ours.items() for line in house_text.cxx_arrows(name, text)])


@pytest.mark.parametrize(
    ("house_name", "include", "allowed"),
    [
        ("kernels", '"plugins/kernels/types.h"', True),
        ("kernels", "<cstdint>", True),
        ("kernels", "<immintrin.h>", True),
        ("kernels", '"plugins/onnxruntime/abi.h"', False),
        ("kernels", '"types.h"', False),
        ("kernels", "<onnxruntime_c_api.h>", False),
        ("kernels", "<NvInfer.h>", False),
        ("kernels", "<torch/extension.h>", False),
        ("onnxruntime", '"plugins/kernels/types.h"', True),
        ("onnxruntime", '"plugins/tensorrt/abi.h"', False),
        ("onnxruntime", "<NvInfer.h>", False),
        ("tensorrt", '"plugins/onnxruntime/abi.h"', False),
        ("tensorrt", "<NvInfer.h>", True),
        ("tensorrt", '"tests/tensorrt_harness/life.h"', False),
        ("common", "<cstdint>", False),
    ],
)
def test_wrong_include_is_found(house_name: str, include: str, allowed: bool) -> None:
    found = house_text.cxx_arrows(f"plugins/{house_name}/a.h", f"#ifdef X\n  # include {include}\n")
    assert (found == []) == allowed


@pytest.mark.parametrize("header", [name for name in CXX if name.endswith(".h")])
def test_header_compiles_alone(header: str) -> None:
    assert house_text.compile_alone(header, house.ROOT) == ""


def test_header_that_leans_on_another_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("inline int64_t size() { return 1; }\n")
    assert re.search("int64_t", house_text.compile_alone("a.h", tmp_path))


def test_examples_use_public_names() -> None:
    own = {Path(name).stem for name in EXAMPLES}
    for name, text in EXAMPLES.items():
        _nothing(house_text.example_imports(name, text, public=PUBLIC, own=own))


@pytest.mark.parametrize(
    "line",
    [
        "from exporter import ops",
        "from exporter.models import create_model",
        "import exporter.ops",
        "import exporter as vssm",
        "import exporter\nexporter.pipeline.open_session('out')",
        "import onnxruntime",
        "from . import digits",
    ],
)
def test_example_behind_the_door_is_found(line: str) -> None:
    assert len(house_text.example_imports("a.py", line, public=PUBLIC, own={"digits"})) == 1


def test_every_comparison_has_a_tolerance() -> None:
    _nothing(
        [line for name, text in TESTS.items() for line in house_text.bare_allclose(name, text)]
    )


@pytest.mark.parametrize(
    ("call", "bare"),
    [
        ("np.testing.assert_allclose(a, b)", True),
        ("torch.allclose(a, b, equal_nan=True)", True),
        ("assert_close(a, b)", True),
        ("torch.testing.assert_close(a, b, **TOLERANCE[dtype])", False),
        ("np.allclose(a, b, rtol=0, atol=1e-6)", False),
    ],
)
def test_bare_allclose_is_found(call: str, bare: bool) -> None:
    assert len(house_text.bare_allclose("a.py", call)) == int(bare)


@pytest.mark.parametrize("scripts", ["examples", "benchmarks", "docs"])
def test_no_folder_beside_a_script_hides_a_package(scripts: str) -> None:
    """Python puts a script's folder first: examples/triton was taken for the package triton."""
    packages = {*importlib.metadata.packages_distributions(), "triton", "tensorrt", "mamba_ssm"}
    folders = {p.name for p in (house.ROOT / scripts).iterdir() if p.is_dir()}
    assert "cpp" in folders or scripts != "examples"
    _nothing(sorted(folders & {*packages, *sys.stdlib_module_names}))
