"""How Inductor calls the ops of octav_fx: into memory that it has planned.

By itself Inductor would let each op allocate its result. Written into planned buffers instead, results reuse memory
that is warm and mapped already; on a CPU fresh pages cost more than the passes that fill them. Two ops, divide and
ratio, are code that Inductor generates; others, product_of_codes and the layers on codes, allocate by themselves. The
latter are called past the dispatcher, with all that is no tensor bound beforehand: ops/bound.py.

And how it reads codes of two bytes, those of 8 bits: by itself it would not vectorize a loop that int16 is in, which
took four fifths of what it generates for backward with 8-bit activations.
"""

from typing import Any, Final

import torch
from torch import fx

from octav_fx.compat.inductor import (
    Bound,
    fallback_handler,
    ir,
    lowerings,
    make_pointwise,
    ops,
    planned_fake_mode,
    register_lowering,
    vectorize_where,
    writes_python,
    writes_several,
    written_into,
)
from octav_fx.ir.joint import CONVERT, VIEWS
from octav_fx.ops.product_of_codes.op import product_of_codes
from octav_fx.ops.register import REGISTERED


def register() -> None:
    """Register a lowering for each op that has an out= variant; once is enough, twice does no harm."""
    vectorize_where(torch.int16, _reads_codes)
    for name, packet in REGISTERED.items():
        if packet.default in lowerings:
            continue
        if name in _GENERATED:
            register_lowering(packet.default, broadcast=True)(_GENERATED[name])
        else:
            _register(name, packet)
    if product_of_codes.default not in lowerings:
        _register_channels_last(product_of_codes.default)
        for op in (torch.ops.octav.integer_conv, torch.ops.octav.integer_linear):
            _register_bound(op.__name__, op.default)


# What shows a value as it is: of a copy in another dtype, or between other values, Inductor generates code.
_SHOWN: Final = VIEWS - {CONVERT, torch.ops.aten._to_copy.default, torch.ops.aten.constant_pad_nd.default}


def _reads_codes(gm: fx.GraphModule) -> bool:
    """Return whether int16 is nothing but codes in a graph: ops of ours write them, and views show them."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    ours = {node for node in calls if str(node.target).startswith("octav.")}
    wide = [node for node in calls if getattr(node.meta.get("val"), "dtype", None) is torch.int16]
    return bool(ours) and all(node in ours or node.target in _SHOWN for node in wide)


# In inline assembly: tl's own division is exact in some versions of Triton, and in the settings of some users.
_DIVIDE_FLOAT32: Final = "div.rn.f32 $0, $1, $2;"


def _divide(x: ir.TensorBox, y: ir.TensorBox) -> ir.TensorBox:
    on_gpu = x.get_device_or_error().type == "cuda"

    def quotient(x: Any, y: Any) -> Any:
        if on_gpu and dtype is torch.float32:
            return ops.inline_asm_elementwise(x, y, asm=_DIVIDE_FLOAT32, constraints="=f,f,f", dtype=dtype)
        return ops.truediv(x, y)

    dtype = x.get_dtype()
    return make_pointwise(quotient)(x, y)


# In assembly, as sums and products must be one rounding each. _UNIT: the power of two that scales a step to 1 .. 4, and
# x with it, so that nothing over- or underflows. _LOW_RECIPROCAL: what the rounded reciprocal is short of. _RATIO: the
# clamped x times both is one of the two nearest quotients, what that leaves of x is exact, and so the last rounding is
# that of x / step (Markstein's correction). Zeros keep their sign.
_UNIT: Final = (
    "{.reg .b32 e; and.b32 e, $1, 0x7F800000; sub.s32 e, 0x7F000000, e; max.s32 e, e, 0x00800000; mov.b32 $0, e;}"
)
_RECIPROCAL: Final = "rcp.rn.f32 $0, $1;"
_LOW_RECIPROCAL: Final = "{.reg .f32 e, s; neg.f32 s, $1; fma.rn.f32 e, s, $2, 0f3F800000; mul.rn.f32 $0, e, $2;}"
_RATIO: Final = (
    "{.reg .f32 a, s, q, e; .reg .b32 b, c; mul.rn.f32 a, $1, $2; min.NaN.f32 a, a, 0f49800000; "
    "max.NaN.f32 a, a, 0fC9800000; mul.rn.f32 q, a, $5; fma.rn.f32 q, a, $4, q; neg.f32 s, $3; "
    "fma.rn.f32 e, s, q, a; fma.rn.f32 q, e, $4, q; mov.b32 b, $1; mov.b32 c, q; and.b32 b, b, 0x80000000; "
    "or.b32 c, c, b; mov.b32 $0, c;}"
)


def _ratio(x: ir.TensorBox, step: ir.TensorBox) -> ir.TensorBox:
    on_gpu = x.get_device_or_error().type == "cuda"

    def assembled(text: str, *inputs: Any) -> Any:
        constraints = ",".join(["=f", *["f"] * len(inputs)])
        return ops.inline_asm_elementwise(*inputs, asm=text, constraints=constraints, dtype=torch.float32)

    def quotient(x: Any, step: Any) -> Any:
        if not on_gpu or dtype is not torch.float32:
            return ops.truediv(x, step)
        unit = assembled(_UNIT, step)
        scaled = ops.mul(step, unit)
        reciprocal = assembled(_RECIPROCAL, scaled)
        low = assembled(_LOW_RECIPROCAL, scaled, reciprocal)
        return assembled(_RATIO, x, unit, scaled, reciprocal, low)

    dtype = x.get_dtype()
    return make_pointwise(quotient)(x, step)


_GENERATED: Final = {"divide": _divide, "ratio": _ratio}


def _register(name: str, packet: Any) -> None:
    @register_lowering(packet.default, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        with planned_fake_mode():
            example, tensors, constants, unflatten, *_ = ir.FallbackKernel.process_kernel(packet.default, *args)
        if isinstance(example, tuple):
            if not writes_several():
                return fallback_handler(packet.default, add_to_fallback_set=False)(*args)
            return written_into(packet.default, packet.out, example, tensors, constants, unflatten)
        # All tensors come first in our schemas: inputs and constants together are the arguments in their order.
        call = ir.ExternKernelOut(
            layout=ir.FallbackKernel.tensor_to_layout(example),
            inputs=list(tensors),
            constant_args=list(constants),
            python_kernel_name=f"torch.ops.octav.{name}.out",
            op_overload=packet.out,
        )
        return ir.TensorBox.create(call)


def _register_channels_last(op: Any) -> None:
    """Have a layer, whose result lies as its codes do, run with channels last."""

    @register_lowering(op, type_promotion_kind=None)
    def lower(codes: Any, *args: Any) -> Any:
        if len(codes.get_size()) == 4:
            codes = ir.ExternKernel.require_channels_last(codes)
        return fallback_handler(op, add_to_fallback_set=False)(codes, *args)


def _register_bound(name: str, op: Any) -> None:
    @register_lowering(op, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        if not writes_python() or args[0].get_device_or_error().type != "cpu":
            return fallback_handler(op, add_to_fallback_set=False)(*args)
        with planned_fake_mode():
            example, tensors, constants, unflatten, *_ = ir.FallbackKernel.process_kernel(op, *args)
        given, _ = unflatten([...] * len(tensors), constants)
        text = ", ".join(map(repr, (name, *given))).replace("Ellipsis", "...")
        layout = ir.FallbackKernel.tensor_to_layout(example)
        return ir.TensorBox.create(Bound(layout, list(tensors), "octav_fx.ops.bound.Bound", text))
