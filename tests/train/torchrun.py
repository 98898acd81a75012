"""torchrun with two ranks on the CPU, and runs that stop at a step."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.train import epochs

ROOT = Path(__file__).parent.parent.parent


def torchrun(module: str, *arguments: object, stop: int | None = None) -> None:
    """Two ranks of `python -m module`. stop: they end at that step, without a word to each other."""
    launched = ["-m", module] if stop is None else ["-m", "tests.train.torchrun", str(stop), module]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *launched]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == (stop is not None), done.stderr[-4000:]
    assert stop is None or STOPPED in done.stderr, done.stderr[-4000:]


STOPPED = "stopped by the test"


def stop_at(step: int) -> None:
    """Let the loop end before the step of that number."""
    original = epochs._step

    def stopping(task, called, optimizer, batch, number, loss):
        if number == step:
            raise KeyboardInterrupt(STOPPED)
        original(task, called, optimizer, batch, number, loss)

    epochs._step = stopping


if __name__ == "__main__":
    number, name, *rest = sys.argv[1:]
    stop_at(int(number))
    import_module(name).main(rest)
