"""Which tests the edited files reach: python -m tests.support.reached prints their paths, one a line.

A test reaches what it imports, and what that imports. A name that a package only passes on leads to the module that
makes it: `from octav_fx import Config` reaches octav_fx/config.py and not all of octav_fx. A string that is the name of
a module or a file counts as an import: python -m octav_fx in a subprocess, README.md opened and read.
"""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("octav_fx", "passes", "tests", "benchmarks", "examples")
# What every test runs in.
EVERYWHERE = ("constraints.txt", "pyproject.toml", "tests/conftest.py")
# Tests that read all files as text.
READING_ALL = ("tests/test_floors.py", "tests/test_package.py")


def sources(root: Path) -> dict[str, str]:
    """Return the source of every Python file by its path; not those behind the link octav_fx/passes."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    named = {str(path.relative_to(root)): path for path in files}
    return {name: path.read_text() for name, path in named.items() if not name.startswith("octav_fx/passes/")}


def dotted(path: str) -> str:
    """Return the name under which a file is imported; passes/ is octav_fx.passes."""
    name = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
    return f"octav_fx.{name}" if name.split(".")[0] == "passes" else name


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None, str]]:
    """Yield (module, name in it, name here) of every import, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name, alias.asname or alias.name) for alias in node.names)


def strings(tree: ast.Module) -> set[str]:
    """Return the constant strings of a module."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def needs(files: dict[str, str]) -> dict[str, set[str]]:
    """Return what each file imports, files by path, and the last parts of the paths that its strings may name."""
    trees = {path: ast.parse(source) for path, source in files.items()}
    paths = {dotted(path): path for path in files}
    # (package, name in it) -> where the package has it from.
    passed_on = {
        (dotted(path), here): (module, name)
        for path, tree in trees.items()
        if path.endswith("__init__.py")
        for module, name, here in imports(tree)
    }

    def made_in(module: str, name: str | None) -> str | None:
        if f"{module}.{name}" in paths:
            return paths[f"{module}.{name}"]
        if (module, name) in passed_on:
            return made_in(*passed_on[module, str(name)]) or paths[module]
        return paths.get(module)

    found = {}
    for path, tree in trees.items():
        imported = {made_in(module, name) for module, name, _ in imports(tree)}
        # A subprocess of a test: python -m octav_fx table tests.test_main:tiny. In the library they name loggers.
        named = {string.partition(":")[0] for string in strings(tree)} if path.startswith("tests/") else set()
        run = {paths.get(f"{name}.__main__", paths.get(name)) for name in named}
        found[path] = {other for other in imported | run if other} - {path}
    return found


def readers(path: str, files: dict[str, str]) -> set[str]:
    """Return the modules that name a file in a string, and those beside it, which may load it."""
    name, folder = Path(path).name, Path(path).parent
    naming = {other for other, source in files.items() if name in source and {path, name} & strings(ast.parse(source))}
    # C++ of a kernel, and a kernel's module: imported under a name that is put together at run time.
    return naming | {other for other in files if folder != Path(".") and Path(other).parent == folder}


def reached(edited: list[str], files: dict[str, str]) -> list[str]:
    """Return the test files that the edited files reach, in order."""
    tests = sorted(path for path in files if Path(path).name.startswith("test_"))
    if set(edited) & set(EVERYWHERE):
        return tests
    needed = needs(files)
    imported = set().union(*needed.values())
    found = set(edited)
    for path in edited:
        if path not in imported and path not in tests:
            found |= readers(path, files)
    while more := {path for path in needed if needed[path] & found} - found - set(EVERYWHERE):
        found |= more
    return [path for path in tests if path in found or path in READING_ALL]


def edited(root: Path) -> list[str]:
    """Return the files that differ from where this branch left main, committed or not; new ones too."""

    def git(*arguments: str) -> list[str]:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.split()

    (base,) = git("merge-base", "HEAD", "main")
    return [*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")]


def main() -> None:
    """Print the test files that the edited files reach."""
    print(*reached(edited(ROOT), sources(ROOT)), sep="\n")


if __name__ == "__main__":
    main()
