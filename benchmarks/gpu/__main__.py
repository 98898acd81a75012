"""./dev gpu: is every kernel right on this GPU, and if so, how fast; into benchmarks/results/<gpu>.json.

First the tests of the kernels, which then run compiled and not interpreted. Meanwhile the models of the last part are
compiled into Inductor's cache. If a test fails, or none ran to the end, nothing is measured and no file is touched. The
file is written again after every row, so whatever stops the command leaves what was found.

Exit codes: 0, measured; 1, a test failed; 3, no GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import result
from benchmarks.gpu import limited, step, worker

RED, NO_GPU = 1, 3
ROOT = Path(__file__).parents[2]
# Seconds: eight minutes in all, the rest of them for the steps.
ALL, TESTS, KERNEL = 480.0, 170.0, 20.0
LIMITS = {"optimal_clip": 30.0, "int_matmul": 40.0, "solves": 60.0}
# Processes that compile at the same time beside the tests.
COMPILERS = 3


@dataclass
class Report:
    """What was found so far, and where it is kept."""

    name: str
    folder: Path
    device: str
    tests: str
    begun: float
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds that are left of all."""
        return ALL - (time.monotonic() - self.begun)

    def ask(self, part: str, arguments: list[str], seconds: float) -> str | None:
        """Let a worker add rows to a part; return why it stopped early, or None."""
        rows = self.parts.setdefault(part, {"rows": []})["rows"]

        def take(row: dict[str, Any]) -> None:
            rows.append(row)
            self.write()

        return limited.rows(["benchmarks.gpu.worker", *arguments], max(1.0, min(seconds, self.left())), take)

    def write(self) -> None:
        """Write the file as it now is."""
        parts = {**self.parts}
        if "step" in parts:
            parts["step"] = {**parts["step"], "rows": step.with_ratios(parts["step"]["rows"])}
        values = {"gpu": _gpu(self.device), "tests": self.tests, "setting": _SETTING, **parts}
        result.write(self.name, values, self.folder)


_SETTING = {
    "time": "median of CUDA events",
    "attained": "bytes that the op cannot do without, at the bandwidth of a copy of as many elements, over its time",
    "step": f"bfloat16 autocast, SGD, {step.REPEATS} steps; ratio and memory over {step.FLOAT}",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./dev gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    # These three are for the tests of this command: tiny sizes on a CPU, never into results/.
    for hidden in ("--device", "--folder", "--tests"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = given.device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False. Nothing was measured, benchmarks/results is as it was.")
        return NO_GPU
    if device != "cuda" and not given.folder:
        parser.error("--device is for trying this command: it takes a --folder, too")
    begun = time.monotonic()
    models = step.MODELS if device == "cuda" else step.TINY
    with ThreadPoolExecutor(COMPILERS) as pool:
        for name in models:
            for variant in filter(worker.is_compiled, step.VARIANTS):
                pool.submit(_compile, begun, device, name, variant)
        passed, summary = _tests([given.tests] if given.tests else kernel_tests())
        if not passed:
            pool.shutdown(wait=True, cancel_futures=True)
    print(summary, flush=True)
    if not passed:
        print("a kernel is wrong on this GPU, or its tests did not end: no speed is measured, no file is written")
        return RED
    name = _slug(torch.cuda.get_device_name()) if device == "cuda" else device
    report = Report(name, Path(given.folder or result.RESULTS), device, summary, begun)
    for op in worker.KERNELS:
        if stopped := report.ask(op, [op, device], LIMITS.get(op, KERNEL)):
            report.parts[op]["stopped"] = stopped
    # Of every model first what the ratio needs.
    for variant in step.VARIANTS:
        for model in models:
            if stopped := report.ask("step", ["step", device, model, variant], report.left()):
                report.parts["step"]["rows"].append({"model": model, "variant": variant, "error": stopped})
    report.write()
    for part in result.read(name, report.folder).values():
        if isinstance(part, dict) and "rows" in part:
            print(tabulate(part["rows"], headers="keys"), end="\n\n")
    return 0


def _compile(begun: float, *arguments: str) -> None:
    """Run a step in what is left of the time for the tests; an error will show again when it is measured."""
    left = TESTS - (time.monotonic() - begun)
    limited.rows(["benchmarks.gpu.worker", "compile", *arguments], max(0.0, left), lambda row: None)


def kernel_tests() -> list[str]:
    """The files of tests that run on tests/support/interpreter.py's device: the GPU, where there is one."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "tests.support.interpreter" in file.read_text()]


def _tests(files: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and the last line of pytest, or what it printed if they did not."""
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *parallel, *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    except subprocess.TimeoutExpired:
        return False, f"the tests took more than {TESTS:.0f} s"
    last = (done.stdout.strip().splitlines() or ["pytest printed nothing"])[-1].strip("= ")
    # Where all are skipped none has failed, and nothing is known.
    if done.returncode == 0 and " passed" in last:
        return True, last
    return False, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"


def _slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _gpu(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"name": device}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "processors": found.multi_processor_count,
        "gb": round(found.total_memory / 1e9, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
