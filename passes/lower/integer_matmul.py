"""Multiply integer codes instead of the levels that they stand for, where there is a kernel that gains by it.

On the joint graph of forward and backward as save_codes leaves it, and on a graph for inference, whose levels are all
fake_quantize; levels in the dtype of the matmul:

    codes = quantize(x, clip)                    codes = quantize(x, clip)
    y     = dequantize(codes, clip)        ->    y     = dequantize(codes, clip)         for backward only
    v     = fake_quantize(w, clips)              v     = fake_quantize(w, clips)         for backward only
    z     = y @ v.T + bias                       a, b  = int8(codes), int8(quantize(w, clips))
                                                 z     = int_matmul(a, step, b, steps, bias)

because y = a * step and v = b * steps, a step being a clip over a power of two: sum y * v = (sum a * b) * step * steps.
The sum of integers is exact. So z differs from before only by the roundings of y, v and the sum, which it has not.

int8() takes away what quantize adds to a code for backward's sake: beyond the clip is the outermost level, zero is
zero, at a ceiling is not raised. Codes 0..255 become -128..127, which the op knows from bits and sign. What is not
finite has no level: the step of its row becomes NaN, and with it all that the row or column is multiplied with. Codes
of few bits are float8 instead, where that is as exact and faster.

A convolution with kernels of one position is the same matmul on [positions, channels], in memory that is channels last;
a stride leaves out positions first. Backward reads levels or codes as it did; levels that nobody reads go.

Which op takes the place of int_matmul, on which device and for which sizes: ops/matmuls.py. Matmuls on a device without
a kernel are not looked at.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, erase_unread, origin, replace
from octav_fx.ir.meta import fake
from octav_fx.ops.int_matmul.range import offset
from octav_fx.ops.matmuls import CodesMatmul, MatmulKernel, has_kernel, kernel_for
from octav_fx.ops.product_of_codes.reference import grid_of

octav, aten = torch.ops.octav, torch.ops.aten

_CASTS = frozenset({CONVERT, aten._to_copy.default, aten.alias.default, aten.detach.default})
_LEVELS = frozenset({octav.dequantize.default, octav.fake_quantize.default})


def integer_matmul(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    operands = _Operands(gm.graph, {})
    for target, find in _FORMS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            device = fake(node).device
            matmul = find(node) if has_kernel(device) else None
            if matmul is None:
                continue
            kernel = _obstacle(matmul) or kernel_for(device, matmul.of_codes)
            if isinstance(kernel, str):
                edits.append(Edit.unsupported(node.name, kernel))
                continue
            m, n, k = matmul.sizes
            edits.append(Edit(node.name, "integer matmul", f"[{m}, {k}] times [{k}, {n}]"))
            _rewrite(matmul, kernel, operands)
    return edits


@dataclass(frozen=True, slots=True)
class _Matmul:
    """One that is computed from the levels of two quantizers."""

    node: fx.Node
    # What it reads of them: the levels themselves, or views and casts of them.
    inputs: tuple[fx.Node, fx.Node]
    # dequantize or fake_quantize.
    x: fx.Node
    w: fx.Node
    bias: Any
    # What is left out of x between positions; None for a linear layer.
    stride: list[int] | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        rows, n, *rest = fake(self.node).shape
        return rows * math.prod(rest), n, fake(self.w).shape[1]

    @property
    def of_codes(self) -> CodesMatmul:
        """Return what a kernel has to know of it."""
        return CodesMatmul(
            *self.sizes, grid_of(arguments_of(self.x).spec), grid_of(arguments_of(self.w).spec), fake(self.node).dtype
        )


def _mm(node: fx.Node) -> _Matmul | None:
    call = arguments_of(node)
    return _linear(node, call["self"], call.mat2, None)


def _addmm(node: fx.Node) -> _Matmul | None:
    call = arguments_of(node)
    return _linear(node, call.mat1, call.mat2, call["self"]) if call.beta == 1 and call.alpha == 1 else None


def _linear(node: fx.Node, left: fx.Node, right: fx.Node, bias: fx.Node | None) -> _Matmul | None:
    """Return the matmul of levels and a transposed weight."""
    transposed = origin(right, _CASTS)
    if transposed.target is not aten.permute.default or arguments_of(transposed).dims != [1, 0]:
        return None
    x, w = origin(left, _CASTS | {aten.view.default}), origin(arguments_of(transposed)["self"], _CASTS)
    return _Matmul(node, (left, right), x, w, bias) if _are_levels(x, w) else None


def _convolution(node: fx.Node) -> _Matmul | None:
    """Return the matmul that a convolution of levels with kernels of one position is."""
    call = arguments_of(node)
    x, w = origin(call.input, _CASTS), origin(call.weight, _CASTS)
    if not _are_levels(x, w) or fake(w).dim() != 4 or fake(w).shape[2:] != (1, 1):
        return None
    fits = not call.transposed and call.groups == 1 and not any(call.padding)
    return _Matmul(node, (call.input, call.weight), x, w, call.bias, list(call.stride)) if fits else None


_FORMS = {aten.mm.default: _mm, aten.addmm.default: _addmm, aten.convolution.default: _convolution}


def _are_levels(x: fx.Node, w: fx.Node) -> bool:
    """Return whether x has one clip, and w one or one for each output channel, both on integer grids."""
    if x.target not in _LEVELS or w.target is not octav.fake_quantize.default:
        return False
    of_x, of_w = (spec_of(arguments_of(levels).spec).plain for levels in (x, w))
    return of_x is not None and of_w is not None and of_x[1] is None and of_w[1] in (None, 0)


def _obstacle(matmul: _Matmul) -> str | None:
    """Return why it has not the form of int_matmul."""
    value, x = fake(matmul.node), fake(matmul.x)
    if not all(isinstance(size, int) for size in (*value.shape, *x.shape)):
        return "its sizes are not known at compile time"
    if matmul.bias is not None and fake(matmul.bias).dim() != 1:
        return "what is added is no bias"
    *_, k = matmul.sizes
    if k == 0:
        return "it sums over nothing"
    if matmul.stride is None and x.shape[-1] != k:
        return "rows of the matmul are no rows of the quantized tensor"
    if matmul.stride is not None and not x.is_contiguous(memory_format=torch.channels_last):
        return "its channels do not lie together in memory"
    return None


def _rewrite(matmul: _Matmul, kernel: MatmulKernel, operands: "_Operands") -> None:
    node, graph = matmul.node, matmul.node.graph
    m, n, k = matmul.sizes
    x, x_scale = operands.of(matmul.x, kernel.operand, -1 if matmul.stride is None else 1)
    w, w_scale = operands.of(matmul.w, kernel.operand, *range(1, fake(matmul.w).dim()))
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
        codes = matmul.of_codes
        operand = {"x": x, "x_scale": x_scale, "w": w, "w_scale": w_scale, "bias": matmul.bias}
        grids = {"x_bits": codes.x.bits, "x_signed": codes.x.signed, "w_bits": codes.w.bits}
        z = insert_call(graph, kernel.op, operand, grids, {"dtype": codes.dtype})
        if matmul.stride is not None:
            batch, _, height, width = fake(node).shape
            z = insert_aten(graph, aten.view.default, z, [batch, height, width, n])
            z = insert_aten(graph, aten.permute.default, z, [0, 3, 1, 2])
    replace(node, z)
    for read in matmul.inputs:
        erase_unread(read, _CASTS | _LEVELS | {aten.view.default, aten.permute.default})


def _every(node: fx.Node, dim: int, step: int) -> fx.Node:
    size = fake(node).shape[dim]
    return insert_aten(node.graph, aten.slice.Tensor, node, dim, 0, size, step)


def _contiguous(node: fx.Node) -> fx.Node:
    """Gather the codes of the positions that a stride left; all others lie in order already."""
    if fake(node).is_contiguous():
        return node
    return insert_aten(node.graph, aten.clone.default, node, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Operands:
    """The operand and the steps of each quantizer, made once however many matmuls read it."""

    graph: fx.Graph
    made: dict[tuple[fx.Node, torch.dtype, tuple[int, ...]], tuple[fx.Node, fx.Node]]

    def of(self, levels: fx.Node, dtype: torch.dtype, *axes: int) -> tuple[fx.Node, fx.Node]:
        """Return codes of these levels, and a scale for each place along all but these axes; NaN: one is not finite."""
        key = levels, dtype, axes
        if key not in self.made:
            self.made[key] = self._make(levels, dtype, list(axes))
        return self.made[key]

    def _make(self, levels: fx.Node, dtype: torch.dtype, axes: list[int]) -> tuple[fx.Node, fx.Node]:
        graph, call = self.graph, arguments_of(levels)
        grid = grid_of(call.spec)
        with graph.inserting_before(levels):
            if levels.target is octav.dequantize.default:
                codes: fx.Node = call.codes
            else:
                codes = insert_call(graph, octav.quantize.default, call)
            code = codes
            if codes.target is octav.quantize.default and arguments_of(codes).ceiling is not None:
                lowered = insert_aten(graph, aten.sub.Tensor, codes, grid.ceiling_flag)
                is_raised = insert_aten(graph, aten.ge.Scalar, codes, grid.ceiling_flag)
                code = insert_aten(graph, aten.where.self, is_raised, lowered, codes)
            code = insert_aten(graph, aten.clamp_min.default, code, grid.low)
            code = insert_aten(graph, aten.clamp_max.default, code, grid.high)
            if shift := offset(grid.bits, grid.signed):
                code = insert_aten(graph, aten.sub.Tensor, code, shift)
            if dtype.is_floating_point:
                # Triton has no cast from an integer to 8 bits.
                code = insert_aten(graph, CONVERT, code, torch.float32)
            operand = insert_aten(graph, CONVERT, code, dtype)
            # The least code stands for what is not finite.
            lowest = insert_aten(graph, aten.amin.default, codes, axes)
            unknown = insert_aten(graph, aten.eq.Scalar, lowest, torch.iinfo(grid.codes_dtype).min)
            step = insert_aten(graph, aten.div.Tensor, call.clip, float(grid.steps))
            value = fake(call.clip)
            nan = insert_aten(graph, aten.full.default, [], torch.nan, dtype=value.dtype, device=value.device)
            return operand, insert_aten(graph, aten.where.self, unknown, nan, step)
