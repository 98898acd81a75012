"""Find where training broke: the first node whose operand was not finite.

octav_fx.debug.check_finite(loss, model, batch) belongs between loss and backward, in a loop with any optimizer;
first_not_finite(model, batch) asks at any time. Both take float models, too. They are called by these names: what
octav_fx itself exports is what every user needs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.capture.held import is_held
from octav_fx.capture.inputs import as_inputs, tensors_of
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.rerun import run_once
from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer


class NotFinite(OctavError):
    """A loss that is NaN or inf."""


def check_finite(loss: Tensor, model: nn.Module, batch: Any) -> None:
    """Raise NotFinite if the loss [] is NaN or inf, with the first node whose operand was not finite.

    model: what computed the loss, float or from quantize(), with the parameters that it had then: call this before the
    optimizer moves them. batch: its input, as quantize() takes it; it is run once more, and changes no state.
    """
    if bool(loss.isfinite().all()):
        return
    first = first_not_finite(model, batch)
    cause = (
        f"the first operand that is not finite is {first}"
        if first is not None
        else "every operand is finite: the outputs of the last node or the loss itself overflowed"
    )
    raise NotFinite(
        f"the loss is {float(loss.detach())}: {cause}. A lower learning rate, a longer warm-up or clipped gradients "
        "may help; go on from a checkpoint before this step"
    )


def first_not_finite(model: nn.Module, batch: Any) -> str | None:
    """Find the first operand, in the order of execution, that holds NaN or inf on a batch; None if there is none.

    "NODE, operand NAME [shape]" for what quantize() found; for a module that is left as it is, its path and "input" or
    the name of the parameter.
    """
    found: list[str] = []
    names = _names(model)

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        if found:
            return
        own = {} if isinstance(module, FakeQuantizer) else dict(module.named_parameters(recurse=False))
        for name, tensor in [*(("input", t) for t in tensors_of((args, kwargs))), *own.items()]:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                site, operand = names[module]
                found.append(f"{site}, operand {operand or name} {list(tensor.shape)}")
                return

    leaves = [module for module in names if not any(True for _ in module.children()) and not is_held(module)]
    handles = [module.register_forward_pre_hook(check, with_kwargs=True) for module in leaves]
    args, kwargs = as_inputs(batch)
    try:
        # Hooks are Python code: they want the modules themselves, compiled or not.
        with torch.compiler.set_stance("force_eager"):
            run_once(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _names(model: nn.Module) -> dict[nn.Module, tuple[str, str | None]]:
    """Return the node of each module, and its operand where it is a quantizer."""
    names: dict[nn.Module, tuple[str, str | None]] = {m: (name, None) for name, m in model.named_modules()}
    for part in model.modules():
        if (graphs := graphs_of(part)) is not None:
            # A quantizer that several nodes share belongs to the first of them.
            for record in reversed(graphs.records):
                if record.quantizer is not None:
                    names[part.get_submodule(record.quantizer)] = (record.site, record.operand)
    return names
