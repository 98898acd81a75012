"""calibrate(), freeze(), unfreeze(): static clips, so that a deployed model has nothing left to solve.

Static OCTAV (arXiv 2206.06501, appendix E.3): weights keep their own fixed point, activations the average of theirs.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.inputs import batches_of
from octav_fx.capture.modules import QuantizedModule, quantized_modules
from octav_fx.capture.rerun import in_eval_mode, run_once
from octav_fx.compat.tensors import normal_tensors
from octav_fx.errors import OctavError
from octav_fx.ir.arguments import module_input
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.printer import fingerprint
from octav_fx.ir.records import graph_info, update_graph_info
from octav_fx.nn import FakeQuantizer


def calibrate(q: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Run batches in eval mode and keep, for each activation, the average of its clips over them, for freeze().

    batches: tensors, tuples of arguments or dicts of keyword arguments, as quantize() takes them, or a loader of (x, y)
    for a model that takes x; each counts the same. convert() holds for each kind of call among them, such as with a
    cache and without. Where none is a call like the example of quantize, export_onnx() goes by the graph that they ran.
    q keeps its parameters, statistics, modes and random state. Returns q. Raises OctavError if there is no batch, for
    one that forward does not take, and if q is frozen.
    """
    if frozen := [name for name, quantizer in _named_quantizers(q) if quantizer.clip is not None]:
        raise OctavError(f"{frozen[0]} has a static clip already: call octav_fx.unfreeze before calibrate")
    sums: dict[FakeQuantizer, Tensor] = {}
    calls: dict[FakeQuantizer, int] = {}
    hooked, counted = set[FakeQuantizer](), set[FakeQuantizer]()

    def hook(quantizer: nn.Module, inputs: Any, output: Any) -> None:
        if quantizer in counted:
            assert isinstance(quantizer, FakeQuantizer)
            sums[quantizer] = sums.get(quantizer, 0) + quantizer.used.double()
            calls[quantizer] = calls.get(quantizer, 0) + 1

    def hook_new() -> set[FakeQuantizer]:
        new = {quantizer for _, quantizer in _named_quantizers(q) if quantizer.mean is not None} - hooked
        for quantizer in new:
            stack.callback(quantizer.register_forward_hook(hook).remove)
        hooked.update(new)
        return new

    count = 0
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(q))
        # Hooks are Python code: they want the modules themselves, compiled or not.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        counted = hook_new()
        for module in quantized_modules(q):
            stack.enter_context(module.led_by_used())
        for args, kwargs in batches_of(q, batches):
            run_once(q, args, kwargs)
            count += 1
            # A graph for another kind of call has come with quantizers of its own, which nobody has looked at.
            if new := hook_new():
                counted = new
                run_once(q, args, kwargs)
                counted = set(hooked)
    if not count:
        raise OctavError("calibrate got no batches: give at least one like the example inputs of quantize")
    for quantizer, total in sums.items():
        quantizer.average = total / calls[quantizer]
    return q


@normal_tensors()
def freeze(q: nn.Module) -> nn.Module:
    """Give every quantizer in q a static clip, as a float32 buffer that is part of the state_dict; returns q.

    Activations: the average that calibrate() left, moved on by the running mean of later training steps. Weights:
    their own fixed point now. Learned clips ("pact", "lsq"): what has been learned. Tokens and groups of
    activations keep finding a clip for each row, as runtimes do. Freezing again takes new ones. A
    state_dict of a frozen model loads into another one, or into one that is not frozen yet and freezes it.

    In eval mode q computes what convert(q, integers=False) computes, to the last bit, and gradients are those of the
    fake-quantizers; capture/frozen.py says what holds. In training mode nothing changes. Raises OctavError for a
    quantizer that has seen no data, and for a weight with inf or NaN in it.
    """
    modules = quantized_modules(q)
    clips = {quantizer: clip for module in modules for quantizer, clip in _clips(module).items()}
    for quantizer, clip in clips.items():
        quantizer.clip = clip.detach().to(torch.float32).clone()
    for module in modules:
        note_frozen(module)
    return q


def note_frozen(module: QuantizedModule) -> None:
    """Keep what the graphs of a module are that its static clips are for."""
    update_graph_info(module, frozen={mode: fingerprint(module.graph_of(mode)) for mode in module.modes})
    module.refresh()


def unfreeze(q: nn.Module) -> nn.Module:
    """Take freeze() back: every quantizer finds the clip of each tensor anew. Returns q."""
    for module in quantized_modules(q):
        update_graph_info(module, frozen={})
        module.forget()
    for _, quantizer in _named_quantizers(q):
        quantizer.clip = None
    return q


def check_frozen(module: QuantizedModule) -> None:
    """Raise OctavError unless every quantizer of eval mode is frozen and the graphs are those that were frozen."""
    if loose := loose_quantizers(module, module.graph_of(False)):
        raise OctavError(
            f"{loose[0]} finds a clip for each tensor: call octav_fx.calibrate with a few batches, then octav_fx.freeze"
        )
    # A state that was loaded brings clips and no graphs.
    for mode, known in graph_info(module).frozen.items():
        if fingerprint(module.graph_of(mode)) != known:
            raise OctavError(
                f"the graph of {'training' if mode else 'eval'} mode was edited after octav_fx.freeze, its clips may "
                "be of other values: call octav_fx.freeze again, after calibrate if activations changed"
            )


def loose_quantizers(module: QuantizedModule, graph: fx.Graph) -> list[str]:
    """Return the names of the quantizers that a graph of a module calls and that find a clip for each tensor."""
    calls = _quantizer_calls(module, graph)
    return [str(node.target) for node, quantizer in calls if quantizer.clip is None and not quantizer.by_row]


def _clips(module: QuantizedModule) -> dict[FakeQuantizer, Tensor]:
    """Return the static clip of each quantizer.

    Those that training mode alone calls may go without, and those of graphs for kinds of calls that nobody has made
    since calibration.
    """
    clips: dict[FakeQuantizer, Tensor] = {}
    for mode in sorted(module.modes):
        for index, guarded in enumerate(module.graphs_of(mode)):
            known = constants(guarded.graph)
            for node, quantizer in _quantizer_calls(module, guarded.graph):
                value = module_input(node)
                if quantizer.by_row:
                    continue
                if quantizer.learned is not None and quantizer.initialized:
                    clips[quantizer] = quantizer.used
                elif value in known:
                    clips[quantizer] = _fixed_point(quantizer, value_of(module, value))
                elif (clip := _seen(quantizer)) is not None:
                    clips[quantizer] = clip
                elif index == 0 and (not mode or len(module.modes) == 1):
                    raise OctavError(
                        f"{node.target} has seen no data: call octav_fx.calibrate with a few batches before "
                        "octav_fx.freeze"
                    )
    return clips


def _seen(quantizer: FakeQuantizer) -> Tensor | None:
    """Return what calibration or training left, else the clip of an earlier freeze, else None."""
    average = quantizer.average
    return quantizer.clip if average is None else average


def _quantizer_calls(module: QuantizedModule, graph: fx.Graph) -> list[tuple[fx.Node, FakeQuantizer]]:
    calls = [(node, module.get_submodule(str(node.target))) for node in graph.find_nodes(op="call_module")]
    return [(node, called) for node, called in calls if isinstance(called, FakeQuantizer)]


def _fixed_point(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    if quantizer.learned is not None:
        quantizer.init_from_data(x)
        return quantizer.used
    return torch.ops.octav.optimal_clip(x.detach(), quantizer.hint, str(quantizer.spec), quantizer.settings.method)


def _named_quantizers(q: nn.Module) -> list[tuple[str, FakeQuantizer]]:
    quantized_modules(q)
    return [(name, module) for name, module in q.named_modules() if isinstance(module, FakeQuantizer)]
