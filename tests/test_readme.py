"""The README's Python runs as it stands, and the commands it names exist."""

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_its_python_runs(tmp_path, monkeypatch):
    # It writes files beside itself.
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    # Read from top to bottom: a later block may use what an earlier one made.
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_its_commands_exist():
    loader = SourceFileLoader("dev", str(ROOT / "dev"))
    dev = module_from_spec(spec_from_loader("dev", loader))
    loader.exec_module(dev)
    named = set(re.findall(r"\./dev (\w+)", README))
    assert {"demo", "test"} <= named <= set(dev.COMMANDS)
