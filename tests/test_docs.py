"""The documentation: its code prints what it says, its links lead somewhere, and every public name has its entry."""

import json
import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml

import octav_fx
from benchmarks.readme import PAGES as GENERATED
from benchmarks.readme import with_tables
from tests.support.pages import PAGES, ROOT, run

README = ROOT / "README.md"
API = (ROOT / "docs" / "api.md").read_text()
ALL = [README, *PAGES]
WITH_CODE = [page for page in PAGES if re.search(r"^(```python|\$ octav-fx)", page.read_text(), re.MULTILINE)]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.models
@pytest.mark.parametrize(
    "path", [p for p in PAGES if "```python" in p.read_text() or "$ octav-fx" in p.read_text()], ids=named
)
def test_code_prints_what_stands_below_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "octav_fx.report(" in path.read_text():
        pytest.importorskip("plotly")
    for printed in run(path.read_text()):
        assert printed.agrees, f"{printed.expected}\n=== is ===\n{printed.found}"


@pytest.mark.models
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebooks_run_and_hold_no_output(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    namespace: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(path), "exec"), namespace)


def test_a_page_whose_output_is_another_is_found():
    (printed,) = run("```python\nprint(2)\n```\n\n```text\n3\n```\n")
    assert not printed.agrees
    (printed,) = run("```console\n$ octav-fx table no_such:model\nnothing\n```\n")
    assert not printed.agrees


@pytest.mark.parametrize("path", ALL, ids=named)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", ALL, ids=named)
def test_files_and_commands_that_are_named_exist(path):
    text = path.read_text()
    for name in re.findall(r"`((?:octav_fx|passes|tests|benchmarks|examples)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
    loader = SourceFileLoader("dev", str(ROOT / "dev"))
    dev = module_from_spec(spec_from_loader("dev", loader))
    loader.exec_module(dev)
    assert set(re.findall(r"\./dev (\w+)", text)) <= set(dev.COMMANDS)


@pytest.mark.parametrize("path", GENERATED, ids=named)
def test_generated_tables_are_those_of_the_results(path):
    text = path.read_text()
    assert "<!-- generated: " in text
    assert with_tables(text) == text


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


def test_every_public_name_has_its_entry():
    entries = re.findall(r"^::: octav_fx\.(\w+)$", API, re.MULTILINE)
    assert sorted(entries) == sorted(name for name in octav_fx.__all__ if name != "__version__")


def test_every_page_is_in_the_navigation():
    # Tags are those of extensions, which only building needs.
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())
    pages: list[str] = []

    def collect(part: object) -> None:
        match part:
            case str():
                pages.append(part)
            case list():
                [collect(each) for each in part]
            case dict():
                [collect(each) for each in part.values()]

    collect(yaml.safe_load(text)["nav"])
    assert sorted(pages) == sorted(str(path.relative_to(ROOT / "docs")) for path in [*PAGES, *NOTEBOOKS])
    listed = (ROOT / "docs" / "llms.txt").read_text()
    assert all(page in listed for page in pages)
