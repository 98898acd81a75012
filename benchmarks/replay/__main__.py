"""python -m benchmarks.replay: record what the compiler does with each model, and compare it with what is committed.

Exit 0: all of it is as committed. Exit 1: the list says what is not. Exit 2: no model has such a name.
"""

import argparse
import fnmatch
import json
import logging
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from benchmarks.replay import compare
from benchmarks.replay.compare import Hashes
from benchmarks.replay.models import MODELS, Model
from benchmarks.replay.record import FAILED, record

_PROCESSES = 2
_ALL = "*"


def main() -> int:
    arguments = _parser().parse_args()
    globs = arguments.only or [arguments.diff or _ALL]
    chosen = [model for model in MODELS if any(fnmatch.fnmatchcase(model.name, glob) for glob in globs)]
    if not chosen:
        print(f"no model is named {' or '.join(globs)}", file=sys.stderr)
        return compare.NO_MODEL
    began = time.monotonic()
    texts = recorded([model for model in chosen if model.is_here])
    print(f"{len(texts)} models in {time.monotonic() - began:.0f} s", flush=True)
    _tell_missing(chosen)
    failed = [f"{name}: {found[FAILED]}" for name, found in texts.items() if FAILED in found]
    print("".join(f"failed: {line}\n" for line in failed), end="")
    if arguments.texts:
        arguments.texts.write_text(json.dumps(texts))
        return 0
    if arguments.write:
        # A failure is not to be compared with.
        compare.write(compare.hashes({name: found for name, found in texts.items() if FAILED not in found}))
        return int(bool(failed))
    differing = _differing(compare.hashes(texts), compare.committed())
    for name, what, how in differing:
        print(f"{how}: {name}: {what}")
    if arguments.diff:
        # A model that was asked for is shown whether its committed hashes fit or not.
        names = [name for name, *_ in differing] if arguments.diff == _ALL else list(texts)
        _print_diff(texts, names, arguments.against)
    return int(bool(differing))


def _differing(found: Hashes, committed: Hashes) -> list[tuple[str, str, str]]:
    """List what differs of the models that were recorded, and the committed ones that are no more."""
    unknown = {model.name for model in MODELS if model.needs} - set(committed)
    for name in sorted(unknown & set(found)):
        # Whoever committed the file did not have the library.
        print(f"not compared, for it is not committed: {name}")
    compared = {name: row for name, row in found.items() if name not in unknown}
    gone = set(committed) - {model.name for model in MODELS}
    return compare.differences(compared, {name: committed[name] for name in committed if name in found or name in gone})


def recorded(models: list[Model]) -> dict[str, dict[str, str]]:
    """Record models, each in a process of its own: model -> what -> text."""
    # Forked, importing takes longer than most models; one model each, as it must not matter which came before.
    with multiprocessing.get_context("fork").Pool(_PROCESSES, maxtasksperchild=1) as pool:
        # The longest first, so that none is left alone at the end.
        work = sorted(models, key=lambda model: model.lowered + model.float_lowered + model.onnx, reverse=True)
        found = dict(pool.imap_unordered(_recorded, [model.name for model in work], chunksize=1))
    return {model.name: found[model.name] for model in models}


def _recorded(name: str) -> tuple[str, dict[str, str]]:
    torch.set_num_threads(1)
    # What stays float is told there, and is in the table.
    logging.getLogger("octav_fx").setLevel(logging.ERROR)
    return name, record(next(model for model in MODELS if model.name == name))


def _tell_missing(models: list[Model]) -> None:
    missing = [model for model in models if not model.is_here]
    for library in dict.fromkeys(model.needs for model in missing):
        names = ", ".join(model.name for model in missing if model.needs == library)
        print(f"not here, for {library} is not installed: {names}")


def _print_diff(texts: dict[str, dict[str, str]], differing: list[str], ref: str) -> None:
    """Print how the texts differ from those of a commit."""
    names = [name for name in dict.fromkeys(differing) if name in texts]
    if names:
        theirs = compare.texts_of(ref, names)
        print("\n".join(compare.diff({name: texts[name] for name in names}, theirs, ref)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev replay", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="models by name (may be given again)")
    parser.add_argument("--write", action="store_true", help="update the committed hashes instead of comparing")
    parser.add_argument(
        "--diff", nargs="?", const=_ALL, metavar="GLOB", help="print how the texts differ (default: of all that differ)"
    )
    parser.add_argument("--against", default="HEAD", metavar="REF", help="the commit to print the difference to")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="write the texts into a file and do no more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
