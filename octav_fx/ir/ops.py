"""One name for each op, whatever it was spelled as. Rules, analyses and tables speak in these names only.

fx writes nn.Conv2d as a module, Dynamo as torch.conv2d, torch.export as aten: a row lists the spellings of one op.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from octav_fx.compat.modules import conv_forward_of, has_own_forward
from octav_fx.ir.masked_softmax import masked_softmax

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Op:
    """An op: its name, its spelling in a canonical graph, and every other spelling."""

    name: str
    target: Callable[..., Any]
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()


# Matrix multiplications and convolutions: what rules.py has rules for. canonicalize rewrites these to their target.
CONTRACTIONS: Final = (
    Op("conv1d", F.conv1d, (aten.conv1d.default,), modules=(nn.Conv1d,)),
    Op("conv2d", F.conv2d, (aten.conv2d.default,), modules=(nn.Conv2d,)),
    Op("conv3d", F.conv3d, (aten.conv3d.default,), modules=(nn.Conv3d,)),
    Op("conv_transpose1d", F.conv_transpose1d, (aten.conv_transpose1d.default,), modules=(nn.ConvTranspose1d,)),
    Op("conv_transpose2d", F.conv_transpose2d, (aten.conv_transpose2d.input,), modules=(nn.ConvTranspose2d,)),
    Op("conv_transpose3d", F.conv_transpose3d, (aten.conv_transpose3d.input,), modules=(nn.ConvTranspose3d,)),
    Op("linear", F.linear, (aten.linear.default,), modules=(nn.Linear,)),
    Op(
        "matmul",
        torch.matmul,
        (
            *(operator.matmul, operator.imatmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.linalg.matmul),
            *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default),
        ),
        ("matmul", "mm", "bmm", "mv", "dot", "__matmul__", "__imatmul__"),
    ),
    Op("addmm", torch.addmm, (aten.addmm.default,), ("addmm",)),
    Op("addmv", torch.addmv, (aten.addmv.default,), ("addmv",)),
    Op("addbmm", torch.addbmm, (aten.addbmm.default,), ("addbmm",)),
    Op("baddbmm", torch.baddbmm, (aten.baddbmm.default,), ("baddbmm",)),
    Op("grouped_mm", F.grouped_mm, (torch._grouped_mm, aten._grouped_mm.default)),
    Op("einsum", torch.einsum, (torch.functional.einsum,)),
    Op("attention", F.scaled_dot_product_attention, (aten.scaled_dot_product_attention.default,)),
)

# Ops that say something about the sign of their result (signedness.py) or that a pass looks for.
OTHERS: Final = (
    Op("batch_norm", F.batch_norm, (torch.batch_norm,), modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    Op("relu", F.relu, (torch.relu, torch.relu_, aten.relu.default), ("relu", "relu_"), (nn.ReLU,)),
    Op("relu6", F.relu6, modules=(nn.ReLU6,)),
    Op(
        "sigmoid",
        torch.sigmoid,
        (F.sigmoid, torch.sigmoid_, torch.special.expit),
        ("sigmoid", "sigmoid_"),
        (nn.Sigmoid,),
    ),
    Op("hardsigmoid", F.hardsigmoid, modules=(nn.Hardsigmoid,)),
    Op(
        "softmax",
        F.softmax,
        (torch.softmax, masked_softmax, aten.softmax.int),
        ("softmax",),
        (nn.Softmax, nn.Softmax2d),
    ),
    Op("softplus", F.softplus, modules=(nn.Softplus,)),
    Op("abs", torch.abs, (operator.abs,), ("abs", "abs_")),
    Op("exp", torch.exp, (), ("exp",)),
    Op("square", torch.square, (), ("square",)),
    Op("sqrt", torch.sqrt, (), ("sqrt",)),
    Op("pow", torch.pow, (operator.pow,), ("pow",)),
    Op("clamp", torch.clamp, (torch.clip, F.hardtanh), ("clamp", "clamp_", "clip"), (nn.Hardtanh,)),
    Op(
        "max_pool",
        F.max_pool2d,
        (F.max_pool1d, F.max_pool3d, torch.max_pool2d),
        (),
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    ),
    Op("avg_pool", F.avg_pool2d, (F.avg_pool1d, F.avg_pool3d), (), (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)),
    Op(
        "adaptive_avg_pool",
        F.adaptive_avg_pool2d,
        (F.adaptive_avg_pool1d, F.adaptive_avg_pool3d),
        modules=(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    ),
    Op(
        "adaptive_max_pool",
        F.adaptive_max_pool2d,
        (F.adaptive_max_pool1d, F.adaptive_max_pool3d),
        modules=(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    ),
    Op("mean", torch.mean, (), ("mean",)),
    Op("sum", torch.sum, (), ("sum",)),
    Op("amax", torch.amax, (), ("amax",)),
    Op("flatten", torch.flatten, (), ("flatten",), (nn.Flatten,)),
    Op("reshape", torch.reshape, (), ("reshape", "view", "unflatten"), (nn.Unflatten,)),
    Op("permute", torch.permute, (), ("permute",)),
    Op("transpose", torch.transpose, (torch.t, torch.swapaxes), ("transpose", "t", "swapaxes")),
    Op("movedim", torch.movedim, (), ("movedim",)),
    Op("squeeze", torch.squeeze, (), ("squeeze",)),
    Op("unsqueeze", torch.unsqueeze, (), ("unsqueeze",)),
    Op("expand", torch.broadcast_to, (), ("expand", "expand_as")),
    Op("repeat", torch.tile, (torch.repeat_interleave,), ("repeat", "tile", "repeat_interleave")),
    Op("contiguous", torch.clone, (), ("contiguous", "clone", "detach")),
    Op("cast", torch.Tensor.to, (), ("to", "float", "half", "bfloat16", "type_as")),
    Op("roll", torch.roll, (torch.flip,), ("roll", "flip")),
    Op("pixel_shuffle", F.pixel_shuffle, (F.channel_shuffle,), (), (nn.PixelShuffle, nn.ChannelShuffle)),
    Op("chunk", torch.chunk, (torch.split, torch.unbind, torch.tensor_split), ("chunk", "split", "unbind")),
    Op("getitem", operator.getitem),
    Op(
        "dropout",
        F.dropout,
        (F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, aten.dropout.default),
        modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    ),
    Op("identity", torch.positive, (), (), (nn.Identity,)),
    Op("interpolate", F.interpolate, modules=(nn.Upsample,)),
    Op("pad", F.pad, (torch.nn.functional.pad,), (), (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)),
    Op("add", torch.add, (operator.add, operator.iadd), ("add", "add_")),
    Op("mul", torch.mul, (operator.mul, operator.imul), ("mul", "mul_")),
    Op("div", torch.div, (operator.truediv, operator.itruediv), ("div", "div_")),
    Op("cat", torch.cat, (torch.concat, torch.stack)),
    Op("maximum", torch.maximum),
)

_FUNCTIONS: Final = {spelling: op for op in (*CONTRACTIONS, *OTHERS) for spelling in (op.target, *op.functions)}
_METHODS: Final = {spelling: op for op in (*CONTRACTIONS, *OTHERS) for spelling in op.methods}
_MODULES: Final = {spelling: op for op in (*CONTRACTIONS, *OTHERS) for spelling in op.modules}


def op_of(node: fx.Node) -> Op | None:
    """The op a node is a spelling of, or None for what no row knows."""
    match node.op:
        case "call_function":
            return _FUNCTIONS.get(node.target)
        case "call_method":
            return _METHODS.get(str(node.target))
        case "call_module":
            return op_of_module(module_of(node))
    return None


def is_altered(module: nn.Module) -> bool:
    """Whether forward, or what the forward of a convolution calls, is not that of torch's class."""
    if has_own_forward(module):
        return True
    torch_class = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch."))
    return conv_forward_of(type(module)) is not conv_forward_of(torch_class)


def op_of_module(module: nn.Module) -> Op | None:
    """The op a module computes. A subclass counts while it keeps its parent's forward."""
    if is_altered(module):
        return None
    for cls in type(module).__mro__:
        if cls in _MODULES:
            return _MODULES[cls] if type(module).forward is cls.forward else None
    return None


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None, "the graph belongs to no GraphModule"
    return owner.get_submodule(str(node.target))


def in_place(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    match node.op:
        case "call_module":
            return bool(getattr(module_of(node), "inplace", False))
        case "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        case "call_function":
            name = getattr(node.target, "__name__", "")
            named = name.endswith("_") and not name.endswith("__")
            augmented = getattr(node.target, "__module__", "") == "_operator" and name in _AUGMENTED
            return named or augmented or bool(node.kwargs.get("inplace", False)) or "out" in node.kwargs
    return False


_AUGMENTED: Final = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}
)
