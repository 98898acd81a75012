"""How docstrings begin: with what a function does."""

import ast

import pytest

from tests.support.sources import SOURCES

# Where a sentence begins with one of these, its verb comes late or never.
NO_VERBS = frozenset(
    {
        *("A", "An", "The", "That", "This", "These", "Those", "It", "Its", "One", "All", "Each", "Every"),
        *("What", "Whether", "Which", "Why", "How", "Where", "When", "Inside,", "Afterwards"),
        *("Raises", "Returns"),
    }
)


def openings(source: str) -> list[tuple[int, str]]:
    """The line of each function with a docstring, and the docstring's first word."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [(node.lineno, text.split()[0]) for node in functions if (text := ast.get_docstring(node))]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_docstrings_of_functions_begin_with_a_verb(name):
    assert [(line, word) for line, word in openings(SOURCES[name]) if word in NO_VERBS] == []
