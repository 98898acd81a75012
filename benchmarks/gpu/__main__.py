"""./dev gpu [kernels | resnet50 | transformers]: is every kernel right on this GPU, and if so, how fast.

kernels runs the tests of the kernels, which then run compiled and not interpreted, and times each kernel; the other two
time training steps and list the kernels of a step. Without a name all three run: while the tests do, the steps are
compiled, and then timed one after the other. Each writes a file of its own, benchmarks/results/<gpu>-<name>.json, after
every row, so whatever stops a command leaves what was found, and another run goes on from there. If a test fails, or
none ran to the end, nothing is measured and no file is touched; steps are timed only where kernels was green for the
same sources on the same GPU.

Exit codes: 0, measured; 1, a test failed, or was not run; 3, no GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import result
from benchmarks.gpu import int_matmul, limited, step, worker
from octav_fx.ops.int_matmul import measured

RED, NO_GPU = 1, 3
ROOT = Path(__file__).parents[2]
# Seconds of each command.
ALL, TESTS, KERNEL = 520.0, 330.0, 20.0
LIMITS = {"optimal_clip": 30.0, "int_matmul": 40.0, "solves": 60.0}
# Processes of the tests, each of which compiles.
WORKERS = 10


@dataclass
class Report:
    """What was found so far, and where it is kept."""

    name: str
    folder: Path
    device: str
    begun: float
    tests: str = ""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds that are left of all."""
        return ALL - (time.monotonic() - self.begun)

    def resume(self) -> None:
        """Take over the parts of an earlier run of the same sources."""
        found = _read(self.name, self.folder)
        if found.get("sources") == result.sources():
            self.parts = {name: part for name, part in found.items() if isinstance(part, dict) and "rows" in part}

    def has(self, part: str, **fields: Any) -> bool:
        """Tell whether a part has been measured to its end, or has a row with these fields and a time."""
        found = self.parts.get(part)
        if found is None or not fields:
            return found is not None and "stopped" not in found
        return any("ms" in row and fields.items() <= row.items() for row in found["rows"])

    def ask(self, part: str, arguments: list[str], seconds: float) -> str | None:
        """Let a new worker add rows to a part; return why it stopped early, or None."""
        return self.take(part, limited.Worker(["benchmarks.gpu.worker", *arguments]), seconds)

    def take(self, part: str, prepared: limited.Worker, seconds: float) -> str | None:
        """Let a worker go on, and add its rows to a part; return why it stopped early, or None."""
        rows = self.parts.setdefault(part, {"rows": []})["rows"]

        def take(row: dict[str, Any]) -> None:
            rows.append(row)
            self.write()

        prepared.go_on()
        return prepared.rows(max(1.0, min(seconds, self.left())), take)

    def write(self) -> None:
        """Write the file as it now is."""
        parts = {**self.parts}
        if "step" in parts:
            parts["step"] = {**parts["step"], "rows": step.with_ratios(parts["step"]["rows"])}
        about = {"gpu": _gpu(self.device), "sources": result.sources(), "tests": self.tests, "setting": _SETTING}
        result.write(self.name, {**about, **parts}, self.folder)


_SETTING = {
    "time": "median of CUDA events",
    "attained": "bytes that the op cannot do without, at the bandwidth of a copy of as many elements, over its time",
    "step": f"bfloat16 autocast, SGD, {step.REPEATS} steps; busy_ms: all kernels; ratio and memory over {step.FLOAT}",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./dev gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *COMMANDS], metavar="kernels | resnet50 | transformers")
    parser.add_argument("--folder", type=Path, default=result.RESULTS, help="where the files go")
    # These two are for the tests of this command: tiny sizes on a CPU, never into results/.
    for hidden in ("--device", "--tests"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = given.device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False. Nothing was measured, benchmarks/results is as it was.")
        return NO_GPU
    if device != "cuda" and given.folder == result.RESULTS:
        parser.error("--device is for trying this command: it takes a --folder, too")
    names = given.names or list(COMMANDS)
    begun = time.monotonic()
    steps = _Steps([_report(name, device, given.folder, begun) for name in names if name != "kernels"])
    try:
        if "kernels" in names:
            # Compiling takes a CPU as long as testing takes the GPU.
            steps.prepare()
            passed, summary = _tests([given.tests] if given.tests else kernel_tests())
            print(summary, flush=True)
            if not passed:
                print("a kernel is wrong on this GPU, or its tests did not end: no speed is measured, no file written")
                return RED
            kernels = _report("kernels", device, given.folder, begun)
            kernels.tests = summary
            kernels.write()
        green = _green(device, given.folder)
        if green is None:
            print(f"the kernels of these sources have not been tested on this GPU: ./dev gpu --folder {given.folder}")
            return RED
        steps.measure(green)
    finally:
        steps.end()
    if "kernels" in names:
        _measure_kernels(kernels)
    return 0


def _report(name: str, device: str, folder: Path, begun: float) -> Report:
    report = Report(_file(name, device), folder, device, begun)
    report.resume()
    return report


def _measure_kernels(report: Report) -> None:
    """Time each kernel."""
    for op in worker.KERNELS:
        if report.has(op):
            continue
        report.parts.pop(op, None)
        if stopped := report.ask(op, [op, report.device], LIMITS.get(op, KERNEL)):
            report.parts[op]["stopped"] = stopped
    if report.device == "cuda" and report.folder == result.RESULTS:
        # From here on the compiler goes by it.
        measured.write(torch.cuda.get_device_name(), int_matmul.table(report.parts["int_matmul"]["rows"]))
    _end(report)


class _Steps:
    """Training steps that are compiled at the same time, as many as fit the GPU, and timed one after the other."""

    def __init__(self, reports: list[Report]) -> None:
        self._reports = reports
        models = {report.name: step.models_of(report.name, report.device) for report in reports}
        # Of every model first what the ratio needs.
        self._asked = [
            (report, model, variant)
            for report in reports
            for variant in step.VARIANTS
            for model in models[report.name]
            if not report.has("step", model=model, variant=variant)
        ]
        self._prepared: list[limited.Worker] = []

    def prepare(self) -> None:
        """Start to compile those that are next."""
        if self._asked:
            device = self._reports[0].device
            self._prepared = [
                limited.Worker(["benchmarks.gpu.worker", "step", device, model, variant])
                for _, model, variant in self._asked[: step.room(device)]
            ]

    def measure(self, green: str) -> None:
        """Time them all."""
        while self._asked:
            if not self._prepared:
                self.prepare()
            for prepared in self._prepared:
                prepared.wait(self._asked[0][0].left())
            while self._prepared:
                report, model, variant = self._asked.pop(0)
                report.tests = green
                if stopped := report.take("step", self._prepared.pop(0), report.left()):
                    report.parts["step"]["rows"].append({"model": model, "variant": variant, "error": stopped})
        for report in self._reports:
            _end(report)

    def end(self) -> None:
        """End those that are not to be timed any more."""
        for prepared in self._prepared:
            prepared.end()


# Each writes a file; together, or one by one, none may take ten minutes.
COMMANDS = ("kernels", "resnet50", "transformers")


def _end(report: Report) -> int:
    report.write()
    for part in result.read(report.name, report.folder).values():
        if isinstance(part, dict) and "rows" in part:
            rows = [{key: value for key, value in row.items() if key != "kernels"} for row in part["rows"]]
            print(tabulate(rows, headers="keys"), end="\n\n")
    return 0


def _green(device: str, folder: Path) -> str | None:
    """Return the summary of tests that passed for these sources, from the folder or the committed results."""
    for place in (folder, result.RESULTS):
        found = _read(_file("kernels", device), place)
        if found.get("sources") == result.sources():
            return str(found["tests"])
    return None


def _read(name: str, folder: Path) -> dict[str, Any]:
    return result.read(name, folder) if (folder / f"{name}.json").exists() else {}


def _file(name: str, device: str) -> str:
    """NVIDIA H200, kernels -> nvidia-h200-kernels."""
    return f"{_slug(torch.cuda.get_device_name()) if device == 'cuda' else device}-{name}"


def kernel_tests() -> list[str]:
    """The files of tests that run on tests/support/interpreter.py's device: the GPU, where there is one."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "tests.support.interpreter" in file.read_text()]


def _tests(files: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and the last line of pytest, or what it printed if they did not."""
    workers = min(WORKERS, len(files))
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
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
