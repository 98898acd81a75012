"""Imports go down only, and optional packages stay in their one file.

compat, formats < clips < ops < nn < config < ir < capture < passes < everything else.
"""

import ast
import fnmatch
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.sources import ROOT, SOURCES, dotted

FLOORS = {"compat": 0, "formats": 0, "clips": 1, "ops": 2, "nn": 3, "config": 4, "ir": 5, "capture": 6, "passes": 7}
# Modules of the top folder that stand on the lowest floor.
LOW = {"octav_fx.errors": 0, "octav_fx.version": 0}
TOP = 8
# Third-party package -> the files that may import it; None: any.
ALLOWED = {
    "torch": None,
    "networkx": None,
    "tabulate": None,
    "triton": "octav_fx.ops.*.kernel",
    "onnx": "octav_fx.deploy.*",
    "onnxruntime": "octav_fx.deploy.runtimes",
    "onnxscript": "octav_fx.deploy.export",
    "openvino": "octav_fx.deploy.latency",
    "gguf": "octav_fx.deploy.targets.gguf*",
    "torchvision": "octav_fx.zoo",
    "sklearn": "octav_fx.demo",
    "tqdm": "octav_fx.training.progress",
    "pandas": "octav_fx.reporting.rows",
    "plotly": "octav_fx.reporting.report.page",
    "timm": "octav_fx.zoo",
    "transformers": "octav_fx.zoo",
    "safetensors": "octav_fx.cli.models",
}


@dataclass(frozen=True)
class Import:
    module: str
    # Names taken out of it; empty for `import module`.
    names: tuple[str, ...]
    line: int


def imports(source: str) -> Iterator[Import]:
    """Every import, in functions too, and importlib.import_module of a constant."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (Import(alias.name, (), node.lineno) for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"line {node.lineno}: a relative import does not say which floor"
                yield Import(str(node.module), tuple(alias.name for alias in node.names), node.lineno)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="optional")):
                if node.args and isinstance(node.args[0], ast.Constant):
                    yield Import(str(node.args[0].value), (), node.lineno)


def floor(module: str) -> int:
    package = module.split(".")[1] if "." in module else ""
    return LOW.get(module, FLOORS.get(package, TOP))


def faults(name: str, source: str, modules: set[str]) -> list[str]:
    """What is wrong with the imports of one module."""
    found = []
    for made in imports(source):
        where = f"{name}:{made.line}: {made.module}"
        package = made.module.partition(".")[0]
        if package != "octav_fx":
            if package not in sys.stdlib_module_names and not is_allowed(name, package):
                found.append(f"{where}: not in this file")
            continue
        for target in targets(made, modules):
            if floor(target) > floor(name):
                found.append(f"{where}: floor {floor(target)} from floor {floor(name)}")
        found += [f"{where}: {n} is its own" for n in made.names if n.startswith("_") and not n.startswith("__")]
    return found


def targets(made: Import, modules: set[str]) -> set[str]:
    """`from octav_fx import demo` names a module, `from octav_fx.config import Config` a name in one."""
    inside = {f"{made.module}.{n}" if f"{made.module}.{n}" in modules else made.module for n in made.names}
    return inside or {made.module}


def is_allowed(name: str, package: str) -> bool:
    if package not in ALLOWED:
        return False
    place = ALLOWED[package]
    if place is None:
        return package == "torch" or floor(name) >= FLOORS["ops"]
    return fnmatch.fnmatchcase(name, place)


def test_all_modules_are_looked_at():
    assert {"octav_fx", "octav_fx.__main__", "octav_fx.formats.grid", "octav_fx.ops.fake_quantize.op"} <= set(SOURCES)
    assert {"octav_fx.capture.symbolic.trace", "octav_fx.passes.prepare.canonicalize"} <= set(SOURCES)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_down_only(name):
    assert faults(name, SOURCES[name], set(SOURCES)) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("octav_fx.formats.grid", "from octav_fx.nn import Settings", "floor 3 from floor 0"),
        ("octav_fx.formats.grid", "import networkx", "not in this file"),
        ("octav_fx.errors", "import octav_fx.training.quantize", "floor 8 from floor 0"),
        ("octav_fx.ops.cpu", "def f():\n    from octav_fx.ir import ops", "floor 5 from floor 2"),
        ("octav_fx.ir.ops", "import octav_fx.passes.prepare.canonicalize", "floor 7 from floor 5"),
        ("octav_fx.ir.ops", "from octav_fx import passes", "floor 7 from floor 5"),
        ("octav_fx.passes", "from octav_fx import Config", "floor 8 from floor 7"),
        ("octav_fx.reporting.rows", "from octav_fx.training.quantize import _check_model", "_check_model is its own"),
        ("octav_fx.ops.cpu", "import triton.language as tl", "not in this file"),
        ("octav_fx.reporting.rows", "import onnx", "not in this file"),
        ("octav_fx.demo", "import torchvision", "not in this file"),
        ("octav_fx.demo", "import importlib\nimportlib.import_module('torchvision.models')", "not in this file"),
        ("octav_fx.reporting.table", "import pandas", "not in this file"),
    ],
)
def test_what_is_not_allowed_is_found(name, source, fault):
    (found,) = faults(name, source, set(SOURCES))
    assert fault in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("octav_fx.ops.fake_quantize.kernel", "import triton.language as tl"),
        ("octav_fx.deploy.targets.onnx", "import onnx"),
        ("octav_fx.__main__", "from octav_fx import demo, zoo"),
        ("octav_fx.passes.prepare.canonicalize", "from octav_fx.ir.ops import OPS\nimport networkx as nx"),
        ("octav_fx.clips.newton", "import math\nimport torch\nfrom octav_fx.formats.grid import Grid"),
        ("octav_fx", "from octav_fx.version import __version__"),
    ],
)
def test_what_is_allowed_is_not_found(name, source):
    assert faults(name, source, set(SOURCES)) == []


def test_numbers_and_clips_import_torch_and_nothing_else():
    for name, source in SOURCES.items():
        if name.startswith(("octav_fx.formats.", "octav_fx.clips.")):
            outside = {made.module.partition(".")[0] for made in imports(source)} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "octav_fx"}, name


def without_types(source: str) -> str:
    """The source without what stands under `if TYPE_CHECKING:`, which is never run."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


def test_no_module_is_part_of_a_circle():
    reached = {
        name: {target for made in imports(without_types(source)) for target in targets(made, set(SOURCES))}
        & set(SOURCES)
        for name, source in SOURCES.items()
    }
    while reached:
        leaves = {name for name, needed in reached.items() if not needed & set(reached)}
        assert leaves, f"a circle among {sorted(reached)}"
        reached = {name: needed for name, needed in reached.items() if name not in leaves}


def test_tests_take_their_helpers_from_support():
    files = {dotted(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    imported = {
        name: {target for made in imports(source) for target in targets(made, set(files))}
        for name, source in files.items()
    }
    assert "tests.support.graphs" in imported["tests.ir.test_macs"]
    taken = [
        (name, target) for name in files for target in imported[name] if target.rpartition(".")[2].startswith("test_")
    ]
    assert taken == []
