"""convert(): the trained model as real integers, multiplied by the machine or by their definition."""

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.modules import QuantizedModule, quantized_modules
from octav_fx.capture.symbolic.side_effects import drop_stores
from octav_fx.compat.modules import share_forward_hooks
from octav_fx.compat.tensors import normal_tensors
from octav_fx.deploy.freeze import check_frozen, loose_quantizers
from octav_fx.deploy.rule import integer_module, led_by
from octav_fx.errors import OctavError
from octav_fx.ir.pipeline import Pass, run
from octav_fx.ir.records import graph_info, update_graph_info
from octav_fx.ir.sites import in_model
from octav_fx.passes import COMPUTE, CONVERT, INTEGERS


def convert(q: nn.Module, *, integers: bool = True) -> nn.Module:
    """Return a copy of a frozen model in eval mode that stores its quantized weights as integers, and multiplies them.

    Weights are codes (two to a byte for up to 4 bits, else int8) with a float32 scale for each channel, biases are on
    the grid of the sums, activations are rounded with static scales, a batch norm is in scales and biases. What was
    never quantized stays as it is, and hooks around a forward run as they did. It holds for each kind of call that q
    has a graph for and clips of, such as with a cache and without: for those of the batches that calibrate() ran.

    integers: convolutions and linear layers multiply the codes where the CPU can, and pass codes on to each other;
    integer_layers says for each layer whether, or why not. False: the same integers as nn/integer_rule.py defines them,
    in floating point that holds every sum exactly: the same bits on every machine, and those of the onnxruntime file.
    The two round in another order, so a code at a tie may differ by one.

    q, or a module that holds quantized ones, is not changed. Raises OctavError for a model that is not frozen or whose
    graph was edited since.
    """
    return multiplied(rewritten(q, CONVERT)) if integers else rewritten(q, (*CONVERT, *COMPUTE))


def multiplied(converted: nn.Module) -> nn.Module:
    """Let a model on levels, as CONVERT leaves it, multiply codes where the CPU can. Returns it."""
    found = [module for module in converted.modules() if isinstance(module, IntegerModule)]
    for module in (part for first in found for part in (first, *first.octav_further)):
        edits = run(module, INTEGERS)
        known = graph_info(module)
        rows = [
            (in_model(edit.node, known.path, known.is_op), edit.detail if edit.declined else None)
            for edit in edits
            if edit.declined or edit.verb == "multiply"
        ]
        update_graph_info(module, integers=tuple(rows))
    return converted


@normal_tensors()
def rewritten(q: nn.Module, passes: Iterable[Pass]) -> nn.Module:
    """Return a copy of a frozen model in eval mode, each of whose quantized modules the passes have made integers of.

    Raises OctavError like convert.
    """
    passes = tuple(passes)
    converted = {id(module.owner): _rewritten(module, passes, module.owner is q) for module in quantized_modules(q)}
    return copy.deepcopy(q, dict(converted)).eval()


def size_of(module: nn.Module) -> int:
    """Return bytes of the tensors of a module's state_dict; tied ones count once."""
    return bytes_of(value for value in module.state_dict().values() if isinstance(value, Tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return bytes of tensors; tied ones count once."""
    tensors = {value.data_ptr(): value for value in tensors}.values()
    return sum(value.numel() * value.element_size() for value in tensors)


def integer_layers(converted: nn.Module) -> list[tuple[str, str | None]]:
    """Return the name of each matmul and convolution of a converted model, and why it multiplies floats, if it does."""
    found = [module for module in converted.modules() if isinstance(module, IntegerModule)]
    return [row for module in found for row in graph_info(module).integers]


def _rewritten(module: QuantizedModule, passes: tuple[Pass, ...], is_whole: bool) -> IntegerModule:
    check_frozen(module)
    made, *further = [_of_graph(module, index, passes) for index in _holding_now(module)]
    made.hold_further(further)
    share_forward_hooks(module.owner, made)
    made.remember_outline(module.owner)
    if not is_whole:
        made.stand_for(module.user_class)
    return made.requires_grad_(False)


def _holding_now(module: QuantizedModule) -> list[int]:
    """Return which graphs of eval mode hold for what forward, or the user, has left on the module, and have clips.

    What is deployed remembers nothing: it goes on from there in each call. Raises OctavError where none does.
    """
    graphs = module.graphs_of(False)
    tight = [i for i, guarded in enumerate(graphs) if i == 0 or not loose_quantizers(module, guarded.graph)]
    changes = {i: graphs[i].changed(module) for i in tight}
    if not (found := [i for i in tight if changes[i] is None]):
        raise OctavError(
            f"{module.user_class.__name__}: {changes[0]} is not what it was when octav_fx.calibrate ran, and what is "
            "deployed goes on from it as it is: set it back, or call the frozen model once more with a batch like those"
        )
    return found


def _of_graph(module: QuantizedModule, index: int, passes: tuple[Pass, ...]) -> IntegerModule:
    """Return what the passes make of one of the graphs of eval mode."""
    # Its tensors, too: a later step of training must not reach what was deployed.
    working = led_by(copy.deepcopy(module.owner).eval(), index)
    drop_stores(working.graph)
    guards = working.graphs_of(False)[0].guards
    return integer_module(working, passes, None if guards is None else guards.of_inputs(working))
