"""convert(): the trained model as real integers, which computes what the frozen model computes."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from octav_fx.capture.modules import IntegerModule, QuantizedModule, quantized_modules
from octav_fx.compat.modules import has_forward_hooks
from octav_fx.deploy.freeze import check_frozen
from octav_fx.errors import OctavError
from octav_fx.ir.pipeline import run
from octav_fx.ir.records import update_graph_info
from octav_fx.passes import CONVERT


def convert(q: nn.Module) -> nn.Module:
    """A copy of a frozen model in eval mode that stores integers in place of its quantized weights.

    Weights are codes (two to a byte for up to 4 bits, else int8) with a float32 scale for each channel, activations
    are rounded with static scales, a batch norm is one factor and one offset for each channel. What was never
    quantized stays as it is. The forward pass is plain PyTorch in floating point on the levels that the codes stand
    for, the same that the frozen model computes: in float32 on a CPU, bit for bit. q, or a module that holds quantized
    ones, is not changed. Raises OctavError for a model that is not frozen or whose graph was edited since.
    """
    converted = {id(module): _convert(module) for module in quantized_modules(q)}
    return copy.deepcopy(q, dict(converted)).eval()


def size_of(module: nn.Module) -> int:
    """Bytes of the tensors of a module's state_dict; tied ones count once."""
    return bytes_of(value for value in module.state_dict().values() if isinstance(value, Tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; tied ones count once."""
    tensors = {value.data_ptr(): value for value in tensors}.values()
    return sum(value.numel() * value.element_size() for value in tensors)


def _convert(module: QuantizedModule) -> IntegerModule:
    check_frozen(module)
    if has_forward_hooks(module):
        raise OctavError(f"{type(module).__name__} has forward hooks, which a converted model would lose: remove them")
    # Its tensors, too: a later step of training must not reach what was deployed.
    working: Any = copy.deepcopy(module).eval()
    run(working, CONVERT)
    converted = IntegerModule(working, working.graph, type(module).__name__, {})
    update_graph_info(converted, records={False: working.all_records[False]})
    return converted
