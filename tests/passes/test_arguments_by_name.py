"""Passes read the arguments of a call by the names of its parameters: a position would break with another signature."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent / "passes"
# The stages that keep to it.
FOLDERS = ("prepare", "convert", "export")


def positional_reads(source: str) -> Iterator[int]:
    """The lines that take something out of node.args by its position: an index, a slice, an assignment to several."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="args")):
                yield node.lineno
            case ast.Assign(targets=[ast.Tuple() | ast.List()], value=ast.Attribute(attr="args")):
                yield node.lineno


PATHS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_pass_reads_arguments_by_name(path: Path) -> None:
    assert list(positional_reads(path.read_text())) == []


READS = ("w = node.args[1]", "a, b = node.args", "q, k = node.args[:2]", "f(node.args[-1])", "x, *rest = n.args")
NO_READS = ("w = argument(node, 'weight')", "f(*node.args)", "node.args = ()", "len(node.args)")


@pytest.mark.parametrize("source", READS)
def test_a_positional_read_is_found(source: str) -> None:
    assert list(positional_reads(source)) == [1]


@pytest.mark.parametrize("source", NO_READS)
def test_other_uses_of_arguments_are_none(source: str) -> None:
    assert list(positional_reads(source)) == []
