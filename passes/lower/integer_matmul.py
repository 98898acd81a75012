"""Multiply integer codes instead of the levels that they stand for, in the forward of linear layers on a GPU.

On the joint graph of forward and backward, as save_codes leaves it, with levels in the dtype of the matmul:

    codes = quantize(x, clip)                    codes = quantize(x, clip)
    y     = dequantize(codes, clip)        ->    y     = dequantize(codes, clip)         for backward only
    v     = fake_quantize(w, clips)              v     = fake_quantize(w, clips)         for backward only
    z     = y @ v.T + bias                       a, b  = int8(codes), int8(quantize(w, clips))
                                                 z     = int_matmul(a, step, b, steps, bias)

because y = a * step and v = b * steps, a step being a clip over a power of two: sum y * v = (sum a * b) * step * steps.
The sum of integers is exact. So z differs from before only by the roundings of y, v and the sum, which it has not.

int8() takes away what quantize adds to a code for backward's sake: beyond the clip is the outermost level, zero is
zero, at a ceiling is not raised. Codes 0..255 become -128..127, which the op knows from bits and sign. What is not
finite has no level: the step of its row becomes NaN, and with it all that the row or column is multiplied with.

A convolution with kernels of one position is the same matmul on [positions, channels], in memory that is channels last;
a stride leaves out positions first. Backward reads levels or codes as it did.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from octav_fx.formats.grid import Grid
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ops.int_matmul.configs import declined
from octav_fx.ops.int_matmul.range import largest_k, offset

octav, aten = torch.ops.octav, torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default

_CASTS = frozenset({_CONVERT, aten._to_copy.default, aten.alias.default, aten.detach.default})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Why a matmul [M, K] times [K, N] on a device stays as it is, or None.
Decline = Callable[[torch.device, int, int, int], str | None]


def integer_matmul(gm: fx.GraphModule, device: str = "cuda", decline: Decline = declined) -> list[Edit]:
    """See the module's docstring. Matmuls on other devices are not looked at."""
    edits = []
    operands = _Operands(gm.graph, {})
    for target, find in _FORMS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            matmul = find(node)
            if matmul is None or node.meta["val"].device.type != device:
                continue
            reason = _obstacle(matmul) or decline(node.meta["val"].device, *matmul.sizes)
            if reason is None:
                _rewrite(matmul, operands)
                m, n, k = matmul.sizes
                edits.append(Edit(node.name, "integer matmul", f"[{m}, {k}] times [{k}, {n}]"))
            else:
                edits.append(Edit.unsupported(node.name, reason))
    return edits


@dataclass(frozen=True, slots=True)
class _Matmul:
    """One that is computed from the levels of two quantizers."""

    node: fx.Node
    # dequantize or fake_quantize.
    x: fx.Node
    w: fx.Node
    bias: Any
    # What is left out of x between positions; None for a linear layer.
    stride: list[int] | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        rows, n, *rest = self.node.meta["val"].shape
        return rows * math.prod(rest), n, self.w.meta["val"].shape[1]


def _linear(node: fx.Node) -> _Matmul | None:
    """Mm and addmm of levels and a transposed weight."""
    *bias, left, right = node.args
    addend: Any = bias[0] if bias else None
    transposed = _without(right, _CASTS)
    if node.kwargs or transposed.target is not aten.permute.default or transposed.args[1] != [1, 0]:
        return None
    x, w = _without(left, _CASTS | {aten.view.default}), _without(transposed.args[0], _CASTS)
    return _Matmul(node, x, w, addend) if _are_levels(x, w) else None


def _convolution(node: fx.Node) -> _Matmul | None:
    """A convolution of levels with kernels of one position."""
    left, right, bias, stride, padding, _, transposed, _, groups = node.args
    x, w = _without(left, _CASTS), _without(right, _CASTS)
    if not _are_levels(x, w) or w.meta["val"].dim() != 4 or w.meta["val"].shape[2:] != (1, 1):
        return None
    fits = not transposed and groups == 1 and not any(padding)  # type: ignore[arg-type]
    return _Matmul(node, x, w, bias, list(stride)) if fits else None  # type: ignore[arg-type]


_FORMS = {
    aten.mm.default: _linear,
    aten.addmm.default: _linear,
    aten.convolution.default: _convolution,
}


def _without(value: Any, targets: frozenset[Any]) -> fx.Node:
    """What the value is made of by these targets alone."""
    node: fx.Node = value
    while node.target in targets:
        node = node.all_input_nodes[0]
    return node


def _are_levels(x: fx.Node, w: fx.Node) -> bool:
    """Whether x has one clip, and w one or one for each output channel."""
    return (
        x.target in (octav.dequantize.default, octav.fake_quantize.default)
        and w.target is octav.fake_quantize.default
        and x.args[4] is None
        and w.args[4] in (None, 0)
        and bool(w.args[3])
    )


def _obstacle(matmul: _Matmul) -> str | None:
    """Why the op cannot compute it."""
    value, x = matmul.node.meta["val"], matmul.x.meta["val"]
    if not all(isinstance(size, int) for size in (*value.shape, *x.shape)):
        return "its sizes are not known at compile time"
    if value.dtype not in _DTYPES:
        return f"its result is {value.dtype}"
    if matmul.bias is not None and matmul.bias.meta["val"].dim() != 1:
        return "what is added is no bias"
    k = matmul.sizes[2]
    if k == 0:
        return "it sums over nothing"
    if matmul.stride is None and x.shape[-1] != k:
        return "rows of the matmul are no rows of the quantized tensor"
    if matmul.stride is not None and not x.is_contiguous(memory_format=torch.channels_last):
        return "its channels do not lie together in memory"
    largest = largest_k(matmul.x.args[2], matmul.x.args[3], matmul.w.args[2])  # type: ignore[arg-type]
    return f"sums over K = {k} may not fit 32 bits, the largest is {largest}" if k > largest else None


def _rewrite(matmul: _Matmul, operands: "_Operands") -> None:
    node, graph = matmul.node, matmul.node.graph
    m, n, k = matmul.sizes
    x, x_scale = operands.of(matmul.x, -1 if matmul.stride is None else 1)
    w, w_scale = operands.of(matmul.w, *range(1, matmul.w.meta["val"].dim()))
    with graph.inserting_before(node):
        if matmul.stride is not None:
            w = insert_aten(graph, aten.view.default, w, [n, k])
            for dim, step in enumerate(matmul.stride, 1):
                if step > 1:
                    x = _every(x, dim + 1, step)
                    x_scale = _every(x_scale, dim, step)
            x = insert_aten(graph, aten.permute.default, x, [0, 2, 3, 1])
        x, x_scale = (
            insert_aten(graph, aten.view.default, _contiguous(value), shape)
            for value, shape in ((x, [m, k]), (x_scale, [m]))
        )
        x_bits, x_signed = matmul.x.args[2:4]
        value = node.meta["val"]
        z = insert_aten(
            *(graph, octav.int_matmul.default, x, x_scale, w, w_scale, matmul.bias),
            *(x_bits, x_signed, matmul.w.args[2], value.dtype),
        )
        if matmul.stride is not None:
            batch, _, height, width = value.shape
            z = insert_aten(graph, aten.view.default, z, [batch, height, width, n])
            z = insert_aten(graph, aten.permute.default, z, [0, 3, 1, 2])
    node.replace_all_uses_with(z)
    graph.erase_node(node)


def _every(node: fx.Node, dim: int, step: int) -> fx.Node:
    size = node.meta["val"].shape[dim]
    return insert_aten(node.graph, aten.slice.Tensor, node, dim, 0, size, step)


def _contiguous(node: fx.Node) -> fx.Node:
    """Codes of the positions that a stride left are gathered; all others lie in order already."""
    if node.meta["val"].is_contiguous():
        return node
    return insert_aten(node.graph, aten.clone.default, node, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Operands:
    """The int8 operand and the steps of each quantizer, made once however many matmuls read it."""

    graph: fx.Graph
    made: dict[tuple[fx.Node, tuple[int, ...]], tuple[fx.Node, fx.Node]]

    def of(self, levels: fx.Node, *axes: int) -> tuple[fx.Node, fx.Node]:
        """Codes of these levels, and a scale for each place along all but these axes, NaN where one is not finite."""
        if (levels, axes) not in self.made:
            self.made[levels, axes] = self._make(levels, list(axes))
        return self.made[levels, axes]

    def _make(self, levels: fx.Node, axes: list[int]) -> tuple[fx.Node, fx.Node]:
        graph = self.graph
        source, clip, bits, signed, dim, *_ = levels.args
        grid = Grid(bits, signed)  # type: ignore[arg-type]
        with graph.inserting_before(levels):
            if levels.target is octav.dequantize.default:
                codes: Any = source
            else:
                codes = insert_aten(graph, octav.quantize.default, source, clip, bits, signed, dim, None)
            code = codes
            if codes.target is octav.quantize.default and codes.args[5] is not None:
                lowered = insert_aten(graph, aten.sub.Tensor, codes, grid.ceiling_flag)
                is_raised = insert_aten(graph, aten.ge.Scalar, codes, grid.ceiling_flag)
                code = insert_aten(graph, aten.where.self, is_raised, lowered, codes)
            code = insert_aten(graph, aten.clamp_min.default, code, grid.low)
            code = insert_aten(graph, aten.clamp_max.default, code, grid.high)
            if shift := offset(grid.bits, grid.signed):
                code = insert_aten(graph, aten.sub.Tensor, code, shift)
            operand = insert_aten(graph, _CONVERT, code, torch.int8)
            # The least code stands for what is not finite.
            lowest = insert_aten(graph, aten.amin.default, codes, axes)
            unknown = insert_aten(graph, aten.eq.Scalar, lowest, torch.iinfo(grid.codes_dtype).min)
            step = insert_aten(graph, aten.div.Tensor, clip, float(grid.steps))
            value = clip.meta["val"]  # type: ignore[union-attr]
            nan = insert_aten(graph, aten.full.default, [], torch.nan, dtype=value.dtype, device=value.device)
            return operand, insert_aten(graph, aten.where.self, unknown, nan, step)
