"""Ops that keep the values of their first input as they are: move them, select or repeat some, or cast them."""

import operator
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir import signs
from octav_fx.ir.op import Op, Trait


def _moves(name: str, target: Any, *, is_view: bool = False, **spellings: Any) -> Op:
    traits = frozenset({Trait.VIEW} if is_view else ())
    return Op(name, target=target, nonnegative=signs.as_input, traits=traits, **spellings)


MOVEMENT: Final = (
    _moves("flatten", torch.flatten, is_view=True, methods=("flatten",), modules=(nn.Flatten,)),
    _moves("reshape", torch.reshape, is_view=True, methods=("reshape", "view", "unflatten"), modules=(nn.Unflatten,)),
    _moves("permute", torch.permute, is_view=True, methods=("permute",)),
    _moves(
        "transpose",
        torch.transpose,
        is_view=True,
        functions=(torch.t, torch.swapaxes),
        methods=("transpose", "t", "swapaxes"),
    ),
    _moves("movedim", torch.movedim, is_view=True, methods=("movedim",)),
    _moves("squeeze", torch.squeeze, is_view=True, methods=("squeeze",)),
    _moves("unsqueeze", torch.unsqueeze, is_view=True, methods=("unsqueeze",)),
    _moves("expand", torch.broadcast_to, is_view=True, methods=("expand", "expand_as")),
    _moves("repeat", torch.tile, functions=(torch.repeat_interleave,), methods=("repeat", "tile", "repeat_interleave")),
    _moves("contiguous", torch.clone, is_view=True, methods=("contiguous", "clone", "detach")),
    _moves("cast", torch.Tensor.to, is_view=True, methods=("to", "float", "half", "bfloat16", "type_as")),
    _moves("roll", torch.roll, functions=(torch.flip,), methods=("roll", "flip")),
    _moves(
        "pixel_shuffle", F.pixel_shuffle, functions=(F.channel_shuffle,), modules=(nn.PixelShuffle, nn.ChannelShuffle)
    ),
    _moves(
        "chunk",
        torch.chunk,
        is_view=True,
        functions=(torch.split, torch.unbind, torch.tensor_split),
        methods=("chunk", "split", "unbind"),
    ),
    _moves("getitem", operator.getitem, is_view=True),
    _moves("identity", torch.positive, is_view=True, modules=(nn.Identity,)),
)
