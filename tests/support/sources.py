"""The sources of the library, by module."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources() -> dict[str, str]:
    """Dotted name -> source of every module of the library; passes/ is octav_fx.passes."""
    # The symlink octav_fx/passes is left out, whether glob follows links or not.
    files = [path for path in (ROOT / "octav_fx").rglob("*.py") if "passes" not in path.parts[len(ROOT.parts) :]]
    named = {dotted(path.relative_to(ROOT)): path for path in files}
    named |= {f"octav_fx.{dotted(path.relative_to(ROOT))}": path for path in (ROOT / "passes").rglob("*.py")}
    return {name: path.read_text() for name, path in named.items()}


def dotted(path: Path) -> str:
    """A path of a source file as the name of its module."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


SOURCES = sources()
