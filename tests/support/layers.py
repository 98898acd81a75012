"""A case for each contraction of inputs with a weight: how it is called, and what its operands have to be.

Tests of canonicalize and quantize_operands, and of the whole way to integers, walk this table: a new layer is one case.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A layer by its functions, the first of which is that of its row, and the shapes of its tensors in their order."""

    op: str
    functions: tuple[Any, ...]
    inputs: dict[str, tuple[int, ...]]
    # The weight and the bias.
    state: dict[str, tuple[int, ...]]
    # The axis of the weight with one clip for each index.
    channel: int
    # Multiply-accumulates.
    macs: int
    # Further arguments of the functions.
    rest: dict[str, Any] = field(default_factory=dict)
    # A module that computes the same, its arguments, and those of the function, after the tensors, that it becomes.
    module: type[nn.Module] | None = None
    arguments: tuple[Any, ...] = ()
    module_rest: tuple[Any, ...] = ()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {**self.inputs, **self.state}

    def tensors_of(self, function: Any) -> dict[str, tuple[int, ...]]:
        """The shapes by the names that this function gives them; torch.ops has names of its own, self above all."""
        if not isinstance(function, torch._ops.OpOverload):
            return self.tensors
        return dict(zip((a.name for a in function._schema.arguments), self.tensors.values(), strict=False))


def convolution(dims: int, function: Any, overload: Any, module: type[nn.Module]) -> Layer:
    size, result = 7 - dims, (7 - dims + 2 - 3) // 2 + 1
    lists = {"stride": [2] * dims, "padding": [1] * dims, "dilation": [1] * dims}
    return Layer(
        f"conv{dims}d",
        (function, overload),
        {"input": (2, 4) + (size,) * dims},
        {"weight": (6, 2) + (3,) * dims, "bias": (6,)},
        channel=0,
        macs=2 * result**dims * 6 * 2 * 3**dims,
        rest={**lists, "groups": 2},
        module=module,
        arguments=(4, 6, 3, 2, 1, 1, 2),
        module_rest=((2,) * dims, (1,) * dims, (1,) * dims, 2),
    )


def transposed(dims: int, function: Any, overload: Any, module: type[nn.Module]) -> Layer:
    lists = {"stride": [2] * dims, "padding": [1] * dims, "output_padding": [1] * dims}
    return Layer(
        f"conv_transpose{dims}d",
        (function, overload),
        {"input": (2, 4) + (3,) * dims},
        {"weight": (4, 3) + (3,) * dims, "bias": (6,)},
        channel=1,
        # Each input value meets each value of the kernel.
        macs=2 * 3**dims * 4 * 3 * 3**dims,
        rest={**lists, "groups": 2, "dilation": [1] * dims},
        module=module,
        arguments=(4, 6, 3, 2, 1, 1, 2),
        module_rest=((2,) * dims, (1,) * dims, (1,) * dims, 2, (1,) * dims),
    )


LAYERS = (
    convolution(1, F.conv1d, aten.conv1d.default, nn.Conv1d),
    convolution(2, F.conv2d, aten.conv2d.default, nn.Conv2d),
    convolution(3, F.conv3d, aten.conv3d.default, nn.Conv3d),
    transposed(1, F.conv_transpose1d, aten.conv_transpose1d.default, nn.ConvTranspose1d),
    transposed(2, F.conv_transpose2d, aten.conv_transpose2d.input, nn.ConvTranspose2d),
    transposed(3, F.conv_transpose3d, aten.conv_transpose3d.input, nn.ConvTranspose3d),
    Layer(
        "linear",
        (F.linear, aten.linear.default),
        {"input": (2, 3, 4)},
        {"weight": (5, 4), "bias": (5,)},
        channel=0,
        macs=2 * 3 * 5 * 4,
        module=nn.Linear,
        arguments=(4, 5),
    ),
    Layer(
        "bilinear",
        (F.bilinear, aten.bilinear.default),
        {"input1": (2, 3, 4), "input2": (2, 3, 4)},
        {"weight": (5, 4, 4), "bias": (5,)},
        channel=0,
        macs=2 * 3 * 5 * 4 * 4,
        module=nn.Bilinear,
        arguments=(4, 4, 5),
    ),
    Layer(
        "conv_tbc",
        (F.conv_tbc, aten.conv_tbc.default),
        {"input": (7, 2, 4)},
        {"weight": (3, 4, 6), "bias": (6,)},
        channel=2,
        macs=(7 + 2 - 2) * 2 * 3 * 4 * 6,
        rest={"pad": 1},
    ),
)
