"""Activation functions, norms, pools and arithmetic: what says something about signs, or what a pass looks for."""

import operator
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir import signs
from octav_fx.ir.masked_softmax import masked_softmax
from octav_fx.ir.op import Op, Trait, parameters

aten = torch.ops.aten

_POINTWISE: Final = frozenset({Trait.POINTWISE})

BATCH_NORM: Final = Op(
    "batch_norm",
    target=F.batch_norm,
    functions=(torch.batch_norm,),
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    parameters=parameters(
        *("input", "running_mean", "running_var"), weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ),
)

ACTIVATION_FUNCTIONS: Final = (
    Op(
        "relu",
        target=F.relu,
        functions=(torch.relu, torch.relu_, aten.relu.default),
        methods=("relu", "relu_"),
        modules=(nn.ReLU,),
        nonnegative=signs.always,
        traits=_POINTWISE,
    ),
    Op("relu6", target=F.relu6, modules=(nn.ReLU6,), nonnegative=signs.always, traits=_POINTWISE),
    Op(
        "sigmoid",
        target=torch.sigmoid,
        functions=(F.sigmoid, torch.sigmoid_, torch.special.expit),
        methods=("sigmoid", "sigmoid_"),
        modules=(nn.Sigmoid,),
        nonnegative=signs.always,
        traits=_POINTWISE,
    ),
    Op("hardsigmoid", target=F.hardsigmoid, modules=(nn.Hardsigmoid,), nonnegative=signs.always, traits=_POINTWISE),
    Op("silu", target=F.silu, modules=(nn.SiLU,), traits=_POINTWISE),
    Op("hardswish", target=F.hardswish, modules=(nn.Hardswish,), traits=_POINTWISE),
    Op("gelu", target=F.gelu, modules=(nn.GELU,), traits=_POINTWISE),
    Op("mish", target=F.mish, modules=(nn.Mish,), traits=_POINTWISE),
    Op(
        "tanh",
        target=torch.tanh,
        functions=(F.tanh, torch.tanh_),
        methods=("tanh", "tanh_"),
        modules=(nn.Tanh,),
        traits=_POINTWISE,
    ),
    Op(
        "leaky_relu",
        target=F.leaky_relu,
        modules=(nn.LeakyReLU,),
        parameters=parameters("input", negative_slope=0.01),
        traits=_POINTWISE,
    ),
    Op("elu", target=F.elu, modules=(nn.ELU,), parameters=parameters("input", alpha=1.0), traits=_POINTWISE),
    Op(
        "softmax",
        target=F.softmax,
        functions=(torch.softmax, masked_softmax, aten.softmax.int),
        methods=("softmax",),
        modules=(nn.Softmax, nn.Softmax2d),
        nonnegative=signs.always,
    ),
    Op("softplus", target=F.softplus, modules=(nn.Softplus,), nonnegative=signs.always, traits=_POINTWISE),
    Op(
        "clamp",
        target=torch.clamp,
        functions=(torch.clip, F.hardtanh),
        methods=("clamp", "clamp_", "clip"),
        modules=(nn.Hardtanh,),
        parameters=parameters("input", min=None, max=None),
        aliases={"min_val": "min", "max_val": "max"},
        nonnegative=signs.clamp,
        traits=_POINTWISE,
    ),
    Op(
        "dropout",
        target=F.dropout,
        functions=(F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, aten.dropout.default),
        modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        nonnegative=signs.as_input,
        traits=frozenset({Trait.RANDOM, Trait.VIEW}),
    ),
)

ARITHMETIC: Final = (
    Op(
        "abs",
        target=torch.abs,
        functions=(operator.abs,),
        methods=("abs", "abs_"),
        nonnegative=signs.always,
        traits=_POINTWISE,
    ),
    Op("exp", target=torch.exp, methods=("exp",), nonnegative=signs.always, traits=_POINTWISE),
    Op("square", target=torch.square, methods=("square",), nonnegative=signs.always, traits=_POINTWISE),
    Op("sqrt", target=torch.sqrt, methods=("sqrt",), nonnegative=signs.always, traits=_POINTWISE),
    Op(
        "pow",
        target=torch.pow,
        functions=(operator.pow,),
        methods=("pow",),
        parameters=parameters("input", "exponent"),
        nonnegative=signs.power,
        traits=_POINTWISE,
    ),
    Op(
        "add",
        target=torch.add,
        functions=(operator.add, operator.iadd),
        methods=("add", "add_"),
        parameters=parameters("input", "other", alpha=1),
        nonnegative=signs.as_all("input", "other", "alpha"),
        traits=_POINTWISE,
    ),
    Op(
        "mul",
        target=torch.mul,
        functions=(operator.mul, operator.imul),
        methods=("mul", "mul_"),
        parameters=parameters("input", "other"),
        nonnegative=signs.product,
        traits=_POINTWISE,
    ),
    Op(
        "div",
        target=torch.div,
        functions=(operator.truediv, operator.itruediv),
        methods=("div", "div_"),
        parameters=parameters("input", "other"),
        nonnegative=signs.as_all("input", "other"),
        traits=_POINTWISE,
    ),
    Op(
        "cat",
        target=torch.cat,
        functions=(torch.concat, torch.stack),
        parameters=parameters("tensors", dim=0),
        nonnegative=signs.as_all("tensors"),
    ),
    Op(
        "maximum",
        target=torch.maximum,
        parameters=parameters("input", "other"),
        nonnegative=signs.as_all("input", "other"),
        traits=_POINTWISE,
    ),
    Op(
        "mean",
        target=torch.mean,
        methods=("mean",),
        parameters=parameters("input", dim=None, keepdim=False),
        nonnegative=signs.as_input,
    ),
    Op("sum", target=torch.sum, methods=("sum",), nonnegative=signs.as_input),
    Op("amax", target=torch.amax, methods=("amax",), nonnegative=signs.as_input),
)

POOLS: Final = (
    Op(
        "max_pool",
        target=F.max_pool2d,
        functions=(F.max_pool1d, F.max_pool3d, torch.max_pool2d),
        modules=(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        parameters=parameters(
            *("input", "kernel_size"), stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
        ),
        nonnegative=signs.as_input,
    ),
    Op(
        "avg_pool",
        target=F.avg_pool2d,
        functions=(F.avg_pool1d, F.avg_pool3d),
        modules=(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        parameters=parameters(
            *("input", "kernel_size"),
            **{"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None},
        ),
        nonnegative=signs.as_input,
    ),
    Op(
        "adaptive_avg_pool",
        target=F.adaptive_avg_pool2d,
        functions=(F.adaptive_avg_pool1d, F.adaptive_avg_pool3d),
        modules=(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        parameters=parameters("input", "output_size"),
        nonnegative=signs.as_input,
    ),
    Op(
        "adaptive_max_pool",
        target=F.adaptive_max_pool2d,
        functions=(F.adaptive_max_pool1d, F.adaptive_max_pool3d),
        modules=(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        nonnegative=signs.as_input,
    ),
    Op(
        "interpolate",
        target=F.interpolate,
        modules=(nn.Upsample,),
        parameters=parameters("input", size=None, scale_factor=None, mode="nearest", align_corners=None),
        nonnegative=signs.interpolate,
    ),
    Op(
        "pad",
        target=F.pad,
        modules=(
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        ),
        parameters=parameters("input", "pad", mode="constant", value=None),
        aliases={"padding": "pad"},
        nonnegative=signs.pad,
    ),
)
