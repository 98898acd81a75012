"""How Inductor calls the ops of octav_fx: into memory that it has planned.

By itself Inductor would let each op allocate its result. Written into planned buffers instead, results reuse memory
that is warm and mapped already; on a CPU fresh pages cost more than the passes that fill them.
"""

from typing import Any

from octav_fx.compat.inductor import ir, lowerings, planned_fake_mode, register_lowering
from octav_fx.ops.register import REGISTERED


def register() -> None:
    """Register a lowering for each op that has an out= variant; once is enough, twice does no harm."""
    for name, packet in REGISTERED.items():
        if packet.default not in lowerings:
            _register(name, packet)


def _register(name: str, packet: Any) -> None:
    @register_lowering(packet.default, type_promotion_kind=None)
    def lower(*args: Any) -> ir.TensorBox:
        with planned_fake_mode():
            example, tensors, constants, *_ = ir.FallbackKernel.process_kernel(packet.default, *args)
        # All tensors come first in our schemas: inputs and constants together are the arguments in their order.
        call = ir.ExternKernelOut(
            layout=ir.FallbackKernel.tensor_to_layout(example),
            inputs=list(tensors),
            constant_args=list(constants),
            python_kernel_name=f"torch.ops.octav.{name}.out",
            op_overload=packet.out,
        )
        return ir.TensorBox.create(call)
