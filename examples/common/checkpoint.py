"""One file from which a run goes on to the same curve: model, optimizer, what a state_dict lacks, and the progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

import octav_fx
from examples.common.distributed import share_buffers
from examples.common.files import write
from octav_fx import OctavError

Row = dict[str, Any]


@dataclass
class Progress:
    """How far a run has come."""

    # Steps that are done.
    step: int = 0
    # The curve so far.
    rows: list[Row] = field(default_factory=list)
    # What Task.note returned so far.
    notes: list[Row] = field(default_factory=list)
    # CPU time of this process, and of those that it goes on from.
    seconds: float = 0.0
    # Sum of the losses of this rank since the last row of the curve.
    loss: float = 0.0


def save(
    path: Path, q: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Write a checkpoint. Every rank calls this; rank 0 gathers and writes.

    "model" has the float model's keys and full tensors, with DDP and with FSDP2. Hints and running means are kept for
    each rank: a clip is the same from any hint only to the solver's last digits, and a resumed run is to be equal in
    all of them. The optimizer has to have a state: torch does not read back that of SGD without momentum.
    """
    share_buffers(q)
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, state = dcp.get_state_dict(q, optimizer, options=options)
    own = {"extra": octav_fx.state(q), "loss": progress.loss}
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    if gathered is not None:
        common = {"step": progress.step, "rows": progress.rows, "notes": progress.notes, "seconds": progress.seconds}
        values = {"model": model, "optimizer": state, "ranks": gathered, "progress": common, "settings": dict(settings)}
        write(path, lambda place: torch.save(values, place))


def restore(
    path: Path, q: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Bring all of them to where save() found them. Every rank calls this.

    With another number of ranks the run goes on with the quantizers of rank 0, and with the mean of the losses on each.
    Raises OctavError, and changes nothing, for a checkpoint of other settings.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    _check_same(path, found["settings"], settings)
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_state_dict(
        q, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=options
    )
    saved, rank = found["ranks"], dist.get_rank()
    same = len(saved) == dist.get_world_size()
    octav_fx.load_state(q, saved[rank if same else 0]["extra"])
    progress.loss = saved[rank]["loss"] if same else sum(one["loss"] for one in saved) / len(saved)
    for name, value in found["progress"].items():
        setattr(progress, name, value)


def weights(path: Path) -> dict[str, Any]:
    """Return the state_dict of the model alone: the float model loads it."""
    return dict(torch.load(path, map_location="cpu", weights_only=True)["model"])


def _check_same(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in sorted({*saved, *asked}):
        if saved.get(name) != asked.get(name):
            raise OctavError(
                f"{path} is of a run with {name}={saved.get(name)!r}, not {asked.get(name)!r}: "
                "choose another --out, or the same settings"
            )
