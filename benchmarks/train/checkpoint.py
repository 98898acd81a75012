"""All that a run has become after some steps, in one file that is there as a whole or not at all."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Model, hints of its quantizers, optimizer, random state, and progress: plain values."""
    values = {
        "model": model.state_dict(),
        # Not in the state_dict, and no result depends on them but in its last bit, as Newton starts there.
        "buffers": dict(model.named_buffers()),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "progress": progress,
    }
    write(path, lambda place: torch.save(values, place))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring model, optimizer and random state to where save() found them; returns progress."""
    values = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(values["model"], strict=True)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values["buffers"].items():
            buffers[name].copy_(value)
    optimizer.load_state_dict(values["optimizer"])
    torch.set_rng_state(values["random"].cpu())
    return dict(values["progress"])


def weights(path: Path) -> dict[str, Any]:
    """The state_dict of the model alone."""
    return dict(torch.load(path, map_location="cpu", weights_only=True)["model"])


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV with these columns, whole or not at all."""

    def make(place: Path) -> None:
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write(path, make)


def write(path: Path, make: Any) -> None:
    """Let make(place) write a file, and put it where it belongs in one step: whoever is killed leaves the old one."""
    place = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        make(place)
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)
