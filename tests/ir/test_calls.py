"""calls: arguments by the names of the schema, defaults included; errors name the op and what it takes."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import fx

from octav_fx.errors import OctavError
from octav_fx.ir.calls import arguments_of, insert_call, update_arguments
from octav_fx.ir.printer import graph_text
from octav_fx.passes import save_codes, split_quantizers
from tests.support.joint import codes_of, joint, layer_inputs, linear, lower

aten, octav = torch.ops.aten, torch.ops.octav
ROOT = Path(__file__).parent.parent.parent


def graph() -> fx.GraphModule:
    gm = joint(linear(), *layer_inputs())
    lower(gm, split_quantizers, save_codes)
    return gm


def test_arguments_by_name() -> None:
    (codes,) = codes_of(graph())
    call = arguments_of(codes)
    assert list(call) == ["x", "clip", "spec", "ceiling"]
    assert (call.spec, call["spec"]) == ("int4/tensor", "int4/tensor")
    assert call.x is codes.args[0]
    assert dict(call)["clip"] is codes.args[1]


def test_defaults_and_keywords() -> None:
    new = fx.Graph()
    x, clip = new.placeholder("x"), new.placeholder("clip")
    call = arguments_of(new.call_function(octav.quantize.default, (x, clip), {"spec": "uint4/channel.0"}))
    assert (call.spec, call.ceiling) == ("uint4/channel.0", None)
    call = arguments_of(new.call_function(aten.addmm.default, (x, x, x), {"alpha": 2}))
    assert (call["self"], call.mat2, call.beta, call.alpha) == (x, x, 1, 2)


def test_what_is_wrong_with_a_call_names_the_op() -> None:
    new = fx.Graph()
    x = new.placeholder("x")
    call = arguments_of(new.call_function(aten.relu.default, (x,)))
    for read in (lambda: call.clip, lambda: call["clip"]):
        with pytest.raises(OctavError, match=r"relu_default: aten.relu.default takes self, there is no 'clip'"):
            read()
    wrong = {
        r"takes 1 arguments by position, not 2": new.call_function(aten.relu.default, (x, x)),
        r"there is no 'inplace'": new.call_function(aten.relu.default, (x,), {"inplace": True}),
        r"aten.mm.default is called without mat2": new.call_function(aten.mm.default, (x,)),
        r"relu: <built-in method relu .* is no op of torch.ops": new.call_function(torch.relu, (x,)),
        r"x: x is no op of torch.ops": x,
    }
    for message, node in wrong.items():
        with pytest.raises(OctavError, match=message):
            arguments_of(node)


def test_copies_and_protocols_ask_for_no_argument() -> None:
    call = arguments_of(codes_of(graph())[0])
    assert dict(copy.copy(call)) == dict(call)
    assert not hasattr(call, "__array__")


def test_arguments_are_updated_in_place() -> None:
    gm = graph()
    (codes,) = codes_of(gm)
    hint = arguments_of(arguments_of(codes).clip).hint
    update_arguments(codes, clip=hint, ceiling=6.0)
    assert (arguments_of(codes).clip, arguments_of(codes).ceiling) == (hint, 6.0)
    assert "quantize_default = quantize.default(mm, primals_4, 'int4/tensor', 6.0)" in graph_text(gm.graph)
    with pytest.raises(OctavError, match="there is no 'scale'"):
        update_arguments(codes, scale=hint)


def test_keywords_at_their_default_are_left_out() -> None:
    new = fx.Graph()
    x = new.placeholder("x")
    node = new.call_function(aten.addmm.default, (x, x, x), {"alpha": 1, "beta": 2})
    update_arguments(node, mat2=x)
    assert node.kwargs == {"beta": 2}
    assert node.args == (x, x, x)


def test_a_call_takes_what_its_schema_names() -> None:
    gm = graph()
    (codes,) = codes_of(gm)
    with gm.graph.inserting_after(codes):
        node = insert_call(gm.graph, octav.fake_quantize.default, arguments_of(codes), gradient="ste")
        with pytest.raises(OctavError, match=r"octav.fake_quantize.default cannot be called without gradient"):
            insert_call(gm.graph, octav.fake_quantize.default, arguments_of(codes))
        with pytest.raises(OctavError, match=r"octav.fake_quantize.default takes x, .* there is no 'ceiling'"):
            insert_call(gm.graph, octav.fake_quantize.default, arguments_of(codes), gradient="ste", ceiling=6.0)
    assert arguments_of(node).spec == "int4/tensor"
    assert node.meta["val"].shape == (7, 30)


# Who reads by position does not notice that a schema has changed.


def positional_reads(source: str) -> list[int]:
    """The lines that read node.args by a number or a slice, or unpack it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="args")):
                found.append(node.lineno)
            case ast.Assign(targets=[ast.Tuple() | ast.List()], value=ast.Attribute(attr="args")):
                found.append(node.lineno)
            case ast.For(iter=ast.Attribute(attr="args")) | ast.comprehension(iter=ast.Attribute(attr="args")):
                found.append(node.iter.lineno)
            case ast.Starred(value=ast.Attribute(attr="args")):
                found.append(node.lineno)
            case ast.Attribute(attr="update_arg" | "set_arg"):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "passes" / "lower").glob("*.py")), ids=lambda path: path.stem)
def test_lowering_reads_arguments_by_name(path: Path) -> None:
    assert positional_reads(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        *("x = node.args[4]", "x = node.args[2:4]", "x, clip, *_ = node.args", "(x,) = node.args", "f(*node.args)"),
        *("for x in node.args: pass", "[x for x in node.args]", "node.update_arg(0, x)", "node.args[1] is x"),
    ],
)
def test_positional_reads_are_found(line: str) -> None:
    assert positional_reads(line) == [1]
