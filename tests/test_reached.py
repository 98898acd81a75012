"""reached: the tests that an edited file may break, and not the others."""

import pytest

from tests.support.reached import reached

FILES = {
    "octav_fx/__init__.py": "from octav_fx.config import Config as Config\nfrom octav_fx.table import table as table\n",
    "octav_fx/__main__.py": "from octav_fx import table\n",
    "octav_fx/config.py": "import logging\nlogging.getLogger('octav_fx')\nclass Config: ...\n",
    "octav_fx/table.py": "def table():\n    from octav_fx.passes import fold\n",
    "octav_fx/ops/cpu.py": "",
    "passes/__init__.py": "from octav_fx.passes.fold import fold\nfrom octav_fx.passes.split import split\n",
    "passes/fold.py": "",
    "passes/split.py": "import octav_fx.ops.cpu\n",
    "tests/__init__.py": "",
    "tests/support/nets.py": "from octav_fx import Config\n",
    "tests/test_config.py": "from octav_fx import Config\n",
    "tests/test_all.py": "import octav_fx\n",
    "tests/test_main.py": "command = ['-m', 'octav_fx', 'tests.test_small:net']\n",
    "tests/test_nets.py": "from tests.support import nets\n",
    "tests/test_package.py": "",
    "tests/test_readme.py": "text = open('README.md')\n",
    "tests/test_small.py": "def net(): ...\n",
    "tests/test_split.py": "from octav_fx.passes import split as halves\n",
}


@pytest.mark.parametrize(
    ("edited", "names"),
    [
        (["octav_fx/config.py"], ["all", "config", "nets"]),
        (["octav_fx/table.py"], ["all", "main"]),
        # In a function, through a name that a package passes on, in a subprocess.
        (["passes/fold.py"], ["all", "main"]),
        (["passes/split.py"], ["split"]),
        # Beside a module that loads it.
        (["octav_fx/ops/kernel.cpp"], ["split"]),
        (["tests/support/nets.py"], ["nets"]),
        (["tests/test_small.py"], ["main", "small"]),
        (["README.md"], ["readme"]),
        (["README.md", "tests/test_small.py"], ["main", "readme", "small"]),
        (["LICENSE"], []),
        ([], []),
    ],
)
def test_what_imports_and_names_lead_to(edited: list[str], names: list[str]) -> None:
    assert reached(edited, FILES) == sorted(f"tests/test_{name}.py" for name in [*names, "package"])


@pytest.mark.parametrize("edited", ["constraints.txt", "tests/conftest.py"])
def test_what_every_test_runs_in_reaches_all(edited: str) -> None:
    assert reached([edited], FILES) == sorted(path for path in FILES if "/test_" in path)
