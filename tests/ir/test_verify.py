"""verify: each invariant holds on what the passes make, and a pass that breaks it is named with it and the node."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx import Config, OctavError
from octav_fx.ir.calls import arguments_of, update_arguments
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import Pass, run
from octav_fx.ir.verify import INVARIANTS, InvariantError, verify
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import LOWER, lower_passes, prepare_passes
from tests.support.graphs import captured
from tests.support.joint import after_relu, codes_of, joint, layer_inputs, linear, lower, weight

octav, aten = torch.ops.octav, torch.ops.aten
Change = Callable[[fx.GraphModule], Any]


def find(gm: fx.GraphModule, target: Any) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[0]


def breaking(change: Change) -> Pass:
    """A pass that does something to a graph and says nothing of it."""

    def broken(gm: fx.GraphModule) -> list[Edit]:
        change(gm)
        return []

    return broken


def prepared() -> fx.GraphModule:
    return captured(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), input=torch.randn(3, 4))


def quantizer_of(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if str(node.target).startswith(QUANTIZERS))


def without_value(gm: fx.GraphModule) -> None:
    next(node for node in gm.graph.nodes if node.op == "call_function").meta.clear()


def second_input(gm: fx.GraphModule) -> None:
    node = quantizer_of(gm)
    node.args = (*node.args, *node.args)


def bypassed(gm: fx.GraphModule) -> None:
    """The operand reads what the quantizer reads; the quantizer goes, so that nothing else is wrong."""
    node = quantizer_of(gm)
    node.replace_all_uses_with(node.all_input_nodes[0])
    gm.graph.erase_node(node)


def unread(gm: fx.GraphModule) -> None:
    node = quantizer_of(gm)
    node.replace_all_uses_with(node.all_input_nodes[0])


PREPARED: dict[str, tuple[Change, str]] = {
    "value": (without_value, r"'nodes have fake values' does not hold: \w+: it has no fake value"),
    "input": (second_input, r"'a quantizer has one input, .*' does not hold: quantizers_\w+: takes 2 arguments"),
    "reader": (unread, r"'a quantizer has one input, .*' does not hold: quantizers_\w+: nobody reads it"),
    "operand": (bypassed, r"'operands have a quantizer or a reason' does not hold: 0: input has no quantizer"),
}


@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_graph_that_a_pass_broke(name: str) -> None:
    change, message = PREPARED[name]
    with pytest.raises(InvariantError, match=message) as raised:
        run(prepared(), [*prepare_passes(Config()), breaking(change)])
    assert raised.value.__notes__[0].startswith("in pass broken, after expand_products, canonicalize, ")


def test_what_a_configuration_leaves_float_has_a_reason() -> None:
    edits = run(prepared(), prepare_passes(Config(overrides={"0": None})))
    assert any(edit.declined for edit in edits)


def other_clip(gm: fx.GraphModule) -> None:
    call = arguments_of(find(gm, octav.dequantize.default))
    update_arguments(find(gm, octav.dequantize.default), clip=arguments_of(call.clip).hint)


def other_bits(gm: fx.GraphModule) -> None:
    update_arguments(find(gm, octav.dequantize.default), spec="int3/tensor")


def other_dtype(gm: fx.GraphModule) -> None:
    (codes,) = codes_of(gm)
    update_arguments(codes, spec="int8/tensor")
    update_arguments(find(gm, octav.dequantize.default), spec="int8/tensor")


def per_channel(gm: fx.GraphModule) -> None:
    for node in (codes_of(gm)[0], find(gm, octav.dequantize.default)):
        update_arguments(node, spec="int4/channel.0")


def another_solve(gm: fx.GraphModule) -> None:
    solve = find(gm, octav.optimal_clip.default)
    with gm.graph.inserting_after(solve):
        gm.graph.node_copy(solve)


def joined(gm: fx.GraphModule) -> None:
    solve = find(gm, octav.optimal_clip.default)
    call = arguments_of(solve)
    with gm.graph.inserting_after(solve):
        new = gm.graph.call_function(octav.dynamic_fake_quantize.default, (*call.values(), "pwl"))
        new.meta["val"] = (call.x.meta["val"], call.hint.meta["val"])


def tagged_layer(gm: fx.GraphModule) -> None:
    find(gm, aten.mm.default).meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)


def untagged(gm: fx.GraphModule) -> None:
    for key in ("recompute", "ac_graph_id"):
        del find(gm, octav.dequantize.default).meta[key]


LOWERED: dict[str, tuple[Change, str]] = {
    "value": (without_value, r"'nodes have fake values' does not hold: \w+: its fake value is not in meta\['val'\]"),
    "clip": (
        other_clip,
        r"'codes have one clip and one grid'.* dequantize_default: clip is primals_4, that of",
    ),
    "bits": (
        other_bits,
        r"'codes have one clip and one grid'.* dequantize_default: spec is int3/tensor, that of its codes int4/tensor",
    ),
    "dtype": (other_dtype, r"quantize_default: its codes are torch.int8, not torch.int16"),
    "granularity": (
        per_channel,
        r"'a clip is as fine as its quantizer'.* its clip has 0 axes for int4/channel.0",
    ),
    "solve": (
        another_solve,
        r"'what quantizers compute is read' does not hold: optimal_clip_default_1: nobody",
    ),
    "joined": (joined, r"'no quantizer is one node' does not hold: dynamic_fake_quantize_default: is not split"),
    "tag": (tagged_layer, r"'only levels and what is pointwise are recomputed' does not hold: mm: is recomputed"),
    "no tag": (untagged, r"'backward keeps no float copy' does not hold: dequantize_default: backward reads levels"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_a_joint_graph_that_a_pass_broke(name: str) -> None:
    change, message = LOWERED[name]
    gm = joint(linear(), *layer_inputs())
    with pytest.raises(InvariantError, match=message) as raised:
        lower(gm, *lower_passes(), breaking(change))
    assert raised.value.__notes__[0].startswith("in pass broken, after split_quantizers, save_codes, ")


def test_every_invariant_is_broken_by_a_test_above() -> None:
    messages = [message for _, message in (*PREPARED.values(), *LOWERED.values())]
    for invariant in INVARIANTS:
        beginning = invariant.name.partition(",")[0]
        assert any(beginning in message for message in messages), invariant.name


def test_invariants_that_a_pass_brings_about_hold_from_there_on() -> None:
    known = {pass_.__name__ for pass_ in (*LOWER, *prepare_passes(Config())) if hasattr(pass_, "__name__")}
    known.add("quantize_operands")
    assert {name for invariant in INVARIANTS for name in invariant.after} <= known
    # Before there is nothing to find.
    verify(joint(linear(), *layer_inputs()))


def both(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (after_relu(x, u, weight(w, torch.ones(4)), hint)[0] * 2,)


@pytest.mark.parametrize("function", [linear(), linear(gradient="mad"), linear(gradient="ste"), after_relu, both])
def test_what_the_passes_make_holds(function: Callable[..., Any]) -> None:
    gm = joint(function, *layer_inputs())
    edits = lower(gm, *lower_passes())
    verify(gm, edits, [pass_.__name__ for pass_ in lower_passes()])


def test_off_there_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAV_FX_VERIFY")
    lower(joint(linear(), *layer_inputs()), *lower_passes(), breaking(untagged))


def test_it_is_no_error_of_the_users() -> None:
    # What captures in parts catches those and goes on.
    assert not issubclass(InvariantError, OctavError)
