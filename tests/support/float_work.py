"""How much of what a model multiplies is float, seen from outside of it, beside what its table says."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import octav_fx
from octav_fx import Config
from octav_fx.compat.modules import CALL_CODE
from octav_fx.ir.macs import MacCounter
from octav_fx.ir.records import NOT_CALLED
from tests.support.on_grid import has_at_most

aten = torch.ops.aten
# So few levels that an operand of few elements has more values, if it is float.
COARSE = Config(weight_bits=2, activation_bits=2, edge_bits=None)
# Op -> positions of its operands.
_OPERANDS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default), (0, 1)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.addbmm.default), (1, 2)),
    **dict.fromkeys((aten.convolution.default, aten._convolution.default, aten._grouped_mm.default), (0, 1)),
}


class FloatWork(TorchDispatchMode):
    """Counts multiply-accumulates of products with an operand of more values than levels, in all of its axes."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels, self.macs, self.seen, self.ops = 2**bits, 0, list[str](), 0
        self.is_inside = self.is_in_python = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        if func not in _OPERANDS or self.is_inside:
            return func(*args, **(kwargs or {}))
        with MacCounter() as counter:
            result = func(*args, **(kwargs or {}))
        self.look(func, [args[at] for at in _OPERANDS[func]], counter.macs)
        return result

    def look(self, func: Any, operands: Any, macs: int) -> None:
        if _is_in_python():
            self.is_in_python = True
        far = [operand for operand in operands if not _is_on_grid(operand, self.levels)]
        if far:
            self.macs += macs
            self.seen.append(
                f"{func} {[tuple(operand.shape) for operand in operands]}: {[tuple(f.shape) for f in far]}"
            )


class _Attentions(TorchFunctionMode):
    """Shows FloatWork the operands of a fused attention, inside of which are products that stay float."""

    def __init__(self, work: FloatWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self.work.is_inside:
            return func(*args, **(kwargs or {}))
        self.work.is_inside, before = True, self.work.ops
        try:
            with MacCounter() as counter:
                result = func(*args, **(kwargs or {}))
        finally:
            self.work.is_inside = False
        if self.work.ops == before:
            # What captures runs past the modes of dispatch.
            return result
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        self.work.look("attention", [given[name] for name in ("query", "key", "value")], counter.macs)
        return result


def _is_in_python() -> bool:
    """Whether what runs is called by a forward of the user's, past graphs and layers."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        if name.startswith("<fuzzed") or frame.f_code is CALL_CODE:
            return name.startswith("<fuzzed")
    return False


def _is_on_grid(x: Tensor, levels: int) -> bool:
    rows = (x.reshape(1, -1), *(x.movedim(axis, 0).flatten(1) for axis in range(x.dim()) if x.dim() > 1))
    return any(has_at_most(each, levels) for each in rows)


@contextmanager
def float_work(q: nn.Module, *, is_example: bool) -> Iterator[None]:
    """Check that of what calls multiply inside no more is float than the table of a model of COARSE says.

    The table counts for one call of the example. Of others it is known where nothing runs of which it says that it
    stays float.
    """
    called = set[nn.Module]()
    hook = register_module_forward_pre_hook(lambda module, args: called.add(module))
    try:
        with FloatWork(2) as work, _Attentions(work):
            yield
    finally:
        hook.remove()
    covered = octav_fx.coverage(q)
    # A layer that no graph holds and the example did not call is float where it is called later, and so is what the
    # Python around graphs multiplies by itself.
    is_known = not work.is_in_python and all(
        why == NOT_CALLED and q.get_submodule(site) not in called for site, why, _ in covered.skipped
    )
    allowed = covered.total_macs - covered.quantized_macs if is_example or is_known else math.inf
    assert work.macs <= allowed, f"{work.macs} multiply-accumulates in float, {allowed} in the table: {work.seen}"
