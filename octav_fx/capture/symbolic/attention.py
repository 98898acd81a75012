"""torch's own Python code of multi-head attention, traced through."""

import inspect
import types
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from octav_fx.capture.symbolic.proxies import TrainingFlag

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer


def inlined_attention(tracer: "ValueTracer", args: Any, kwargs: Any) -> Any:
    """Run the code of multi_head_attention_forward on proxies, past its dispatch to them."""
    source = F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda operands: False}
    inner = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    bound = inspect.signature(source).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.arguments["dropout_p"] == 0:
        bound.arguments["training"] = False
    elif isinstance(flag := bound.arguments["training"], TrainingFlag):
        tracer.branched_on.append(flag.target)
        bound.arguments["training"] = flag.value
    return inner(*bound.args, **bound.kwargs)
