"""Where and with what a figure was measured, and the file it is kept in."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions and commit; no commit where only the files are, without their history."""
    changed = _git("status", "--porcelain", "--", "octav_fx", "passes", "benchmarks/*.py")
    return {
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted": None if changed is None else bool(changed),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(name: str, values: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write results/NAME.json and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **values}, indent=2) + "\n")
    return path


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The committed results of a benchmark."""
    return dict(json.loads((folder / f"{name}.json").read_text()))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()}, {capability}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
