"""Where and with what a figure was measured, and the file it is kept in."""

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import octav_fx
from octav_fx import passes
from octav_fx.compat.tensors import has_vnni

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions and commit; no commit where only the files are, without their history."""
    # Paths from the top of the checkout, wherever git runs.
    changed = _git("status", "--porcelain", "--", ":/octav_fx", ":/passes", ":/examples", ":/benchmarks/*.py")
    return {
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted": None if changed is None else bool(changed),
        "date": datetime.now(UTC).date().isoformat(),
    }


def sources() -> str:
    """Of which state of octav_fx a row is."""
    # passes/ by itself: in a checkout it is a folder beside.
    folders = [Path(str(package.__file__)).parent for package in (octav_fx, passes)]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def of_cpu(name: str) -> str:
    """Return the name that results of this kind of CPU have: without VNNI other layers and passes run."""
    return name if has_vnni() else f"{name}_without_vnni"


def write(name: str, values: dict[str, Any], folder: Path | None = None) -> Path:
    """Write results/NAME.json, or NAME.json in another folder, and return its path."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **values}, indent=2) + "\n")
    return path


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The committed results of a benchmark, or those in another folder."""
    return dict(json.loads(((folder or RESULTS) / f"{name}.json").read_text()))


def kept(name: str) -> list[dict[str, Any]]:
    """Return the rows of a result that these very sources gave; none where it is of others."""
    try:
        found = read(name)
    except FileNotFoundError:
        return []
    return list(found["rows"]) if found["setting"].get("sources") == sources() else []


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
