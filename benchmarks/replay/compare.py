"""Hashes against the committed ones, and texts against those of another commit."""

import difflib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks.replay.models import MODELS
from benchmarks.replay.text import short_hash

ROOT = Path(__file__).parents[2]
HASHES = ROOT / "benchmarks" / "results" / "replay.json"

# The recorder knows none of the models it was asked for.
NO_MODEL = 2

# Model -> what -> text, or its hash.
Texts = Mapping[str, Mapping[str, str]]
Hashes = Texts


def hashes(texts: Texts) -> dict[str, dict[str, str]]:
    return {name: {what: short_hash(text) for what, text in found.items()} for name, found in texts.items()}


def committed() -> dict[str, dict[str, str]]:
    return dict(json.loads(HASHES.read_text())) if HASHES.exists() else {}


def write(found: Hashes) -> None:
    """Write these hashes into the committed file; of models that were not looked at, the old ones stay."""
    merged = {**committed(), **found}
    ordered = {model.name: merged[model.name] for model in MODELS if model.name in merged}
    HASHES.write_text(json.dumps(ordered, indent=2) + "\n")


def differences(found: Texts, expected: Texts) -> list[tuple[str, str, str]]:
    """List what differs: model, what, and how."""
    listed = []
    for name in dict.fromkeys([*expected, *found]):
        ours, theirs = found.get(name, {}), expected.get(name, {})
        for what in dict.fromkeys([*theirs, *ours]):
            if ours.get(what) != theirs.get(what):
                how = "new" if what not in theirs else "gone" if what not in ours else "changed"
                listed.append((name, what, how))
    return listed


def texts_of(ref: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Record models at another commit, with the recorder it has, in a worktree that is then removed."""
    with tempfile.TemporaryDirectory(prefix="octav_fx_replay_") as folder:
        tree, output = Path(folder) / "tree", Path(folder) / "texts.json"
        _git("worktree", "add", "--detach", "--quiet", str(tree), ref)
        try:
            if not (tree / "benchmarks" / "replay").is_dir():
                raise SystemExit(f"{ref} has no benchmarks/replay: there is nothing to compare with")
            command = [sys.executable, "-m", "benchmarks.replay", "--texts", str(output)]
            only = [option for name in names for option in ("--only", name)]
            # Before the octav_fx that is installed.
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run([*command, *only], cwd=tree, env=environment)
            if done.returncode not in (0, NO_MODEL):
                raise SystemExit(f"the recorder of {ref} failed, see above")
            return dict(json.loads(output.read_text())) if output.exists() else {}
        finally:
            _git("worktree", "remove", "--force", str(tree))


def diff(ours: Texts, theirs: Texts, ref: str) -> Iterator[str]:
    """Yield the lines of unified diffs from their texts to ours."""
    for name, what, _ in differences(ours, theirs):
        before, after = (texts.get(name, {}).get(what, "").splitlines() for texts in (theirs, ours))
        label = f"{name}: {what}"
        yield from difflib.unified_diff(before, after, f"{label} ({ref})", f"{label} (here)", lineterm="")


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)
