"""Private names of torch stand in octav_fx/compat and nowhere else."""

import ast

import pytest

from tests.support.sources import SOURCES

# An op of ATen is registered under its name, underscore and all; Python's stack has no other name.
NOT_PRIVATE = ("aten", "torch.ops.aten", "sys")
# The names under which modules import it.
TORCH = ("torch", "nn", "fx", "F")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree: ast.AST) -> set[str]:
    """The private names that a module defines: functions, classes, variables, fields."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
    return {name for name in found if is_private(name)}


def set_on_self(tree: ast.AST) -> set[str]:
    """What the methods of a module's classes set: a subclass may set what its parent keeps."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


# QuantizedModule puts the last one into its __dict__.
OURS = {name for source in SOURCES.values() for name in defined_in(ast.parse(source))} | {"_float_module"}


def private_names(source: str) -> list[str]:
    """Private names that a module takes from elsewhere, with their lines."""
    found: list[str] = []
    tree = ast.parse(source)
    own = set_on_self(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in own:
                continue
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("octav_fx"):
                parts = [*module.split("."), *(alias.name for alias in names)]
                found += [f"{node.lineno}: {module}"] if any(map(is_private, parts)) else []
            case ast.Import(names=names):
                found += [f"{node.lineno}: {a.name}" for a in names if any(map(is_private, a.name.split(".")))]
            case ast.Attribute(value=value, attr=name) if is_private(name):
                base = ast.unparse(value)
                if base not in NOT_PRIVATE and (name not in OURS or base.partition(".")[0] in TORCH):
                    found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if not name.startswith("octav_fx.compat")))
def test_no_private_name_of_torch(name):
    assert private_names(SOURCES[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch._guards import detect_fake_mode",
        "from torch.utils import _pytree as pytree",
        "import torch._inductor.config",
        "torch._dynamo.reset()",
        "graph._root.next",
        "module._forward_hooks",
    ],
)
def test_a_private_name_is_found(source):
    assert len(private_names(source)) >= 1


@pytest.mark.parametrize("source", ["aten._to_copy.default", "sys._getframe(1)", "import torch\ntorch.nn.Linear"])
def test_a_public_name_is_not_found(source):
    assert private_names(source) == []
