"""What tests/conftest.py promises of a fast run."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MARKERS, limit
from tests.support.examples import PROFILES

ROOT = Path(__file__).parent.parent
TESTS = """
import subprocess, sys, time
import pytest
from tests.conftest import limit
from tests.support.examples import examples

LONG = 1.2 * limit()
SPIN = f"import time\\nwhile time.process_time() < {LONG}: pass"

def test_quick():
    time.sleep(LONG)

def test_computes():
    end = time.process_time() + LONG
    while time.process_time() < end:
        pass

def test_lets_another_process_compute():
    subprocess.run([sys.executable, "-c", SPIN], check=True)

def test_examples():
    for asked, given in ((300, 30), (40, 10), (4, 4)):
        assert examples(asked).max_examples == given
"""


def outcomes(folder: Path, *arguments: str) -> tuple[dict[str, str], str]:
    """The word that pytest prints for each test of TESTS, and all that it prints."""
    marked = "\n".join(f"@pytest.mark.{marker}\ndef test_{marker}():\n    pass\n" for marker in MARKERS)
    (folder / "test_here.py").write_text(f"{TESTS}\n{marked}")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-rA"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(folder), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    printed = done.stdout + done.stderr
    return {name: word for word, name in re.findall(r"^(PASSED|FAILED) \S+::(\w+)", printed, re.MULTILINE)}, printed


@pytest.mark.slow
@pytest.mark.skipif(math.isinf(limit()), reason="another torch takes its own time")
def test_a_fast_run_leaves_out_what_is_marked_and_fails_what_computes_for_over_a_second(tmp_path: Path) -> None:
    found, printed = outcomes(tmp_path, "--fast")
    assert found == {
        "test_quick": "PASSED",
        "test_computes": "FAILED",
        "test_lets_another_process_compute": "FAILED",
        "test_examples": "PASSED",
    }, printed
    assert f"{len(MARKERS)} deselected" in printed
    assert "s of CPU time: make it cheaper, or mark it with one of models, compile, ranks, slow, stacks, gpu" in printed


@pytest.mark.slow
def test_a_fast_run_takes_a_choice_of_markers_too(tmp_path: Path) -> None:
    found, printed = outcomes(tmp_path, "--fast", "-m", "slow or gpu")
    assert found == {} and f"{4 + len(MARKERS)} deselected" in printed


@pytest.mark.slow
def test_a_full_run_holds_nothing_to_a_second(tmp_path: Path) -> None:
    found, printed = outcomes(tmp_path, "-k", "computes or slow")
    assert found == {"test_computes": "PASSED", "test_slow": "PASSED"}, printed


def test_every_marker_is_explained_where_pytest_reads_it(pytestconfig: pytest.Config) -> None:
    explained = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(MARKERS) <= explained


def test_a_fast_run_tries_a_tenth() -> None:
    assert PROFILES == {"full": 100, "fast": 10}
