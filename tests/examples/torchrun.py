"""torchrun with two ranks on the CPU, and runs that stop at a step."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from examples.common import loop
from examples.common.distributed import process_group

ROOT = Path(__file__).parent.parent.parent


def torchrun(
    module: str, *runs: list[str], stop: dict[int, int] | None = None, fails: dict[int, str] | None = None
) -> None:
    """Two ranks that call main() of a module with each run's arguments, one after the other: importing takes longest.

    stop: the place of a run -> the step before which both ranks leave it. fails: the place of a run -> the error, a
    regular expression, that ends it on both ranks.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "tests.examples.torchrun", module, *map(json.dumps, (runs, stop or {}, fails or {}))],
        # A rank that a signal ends says where it was.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # All of it: the first error is the cause, and torchrun's own summary is last.
    assert done.returncode == 0, done.stderr


class Stopped(BaseException):
    """What kills a run; nothing catches it on its way."""


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Inside, the loop ends before the step of that number: of the whole run, from 0."""
    original = loop._step

    def stopping(*arguments):
        if arguments[-1] == step:
            raise Stopped
        return original(*arguments)

    loop._step = stopping
    try:
        yield
    except Stopped:
        pass
    else:
        raise AssertionError(f"there was no step {step}")
    finally:
        loop._step = original


def main(name: str, runs: list[list[str]], stop: dict[str, int], fails: dict[str, str]) -> None:
    module = import_module(name)
    # torchrun's store serves one group only, so that the runs share it.
    with process_group("cpu"):
        for place, arguments in enumerate(runs):
            with ExitStack() as stack:
                if str(place) in stop:
                    stack.enter_context(stopped_at(stop[str(place)]))
                if str(place) in fails:
                    stack.enter_context(pytest.raises(SystemExit, match=fails[str(place)]))
                module.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
