"""dynamo: graphs from torch.compile look like captured ones, and go back with each hint as one more input."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.from_dynamo import from_dynamo, has_quantizers, lift_hints
from octav_fx.config import Config
from octav_fx.formats.spec import integers
from octav_fx.ir.dataflow import state_name
from octav_fx.ir.edits import site_of
from octav_fx.ir.meta import fake, info
from octav_fx.ir.ops import op_of
from octav_fx.ir.pipeline import run
from octav_fx.ir.printer import graph_text
from octav_fx.nn import FakeQuantizer
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import canonicalize, choose_spec, quantize_operands
from tests.support.graphs import model, parameter


def seen(float_module: Callable[..., Any], *args: Any, read: Callable[[fx.GraphModule], Any]) -> list[Any]:
    """What read says about each graph that Dynamo makes of a call, while it compiles: later it cleans the graph."""
    torch.compiler.reset()
    answers = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        answers.append(read(gm))
        return gm.forward

    torch.compile(float_module, backend=backend)(*args)
    return answers


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """Adopted and quantized."""
    gm = from_dynamo(gm)
    run(gm, [canonicalize, lambda gm: quantize_operands(gm, functools.partial(choose_spec, Config(edge_bits=None)))])
    return gm


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.ModuleDict({"out": nn.Linear(4, 2)})
        self.scale = parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3)) * self.scale
        return self.head["out"](x)


def test_a_float_graph_has_no_quantizers() -> None:
    assert seen(Small(), torch.randn(2, 3, 6, 6), read=has_quantizers) == [False]


@pytest.mark.slow
def test_a_quantized_model_brings_its_quantizers() -> None:
    x = torch.randn(2, 3, 6, 6)
    assert seen(octav_fx.quantize(Small(), x), x, read=has_quantizers) == [True]


@pytest.mark.parametrize("overload", [torch.ops.octav.dynamic_fake_quantize, "default"])
def test_one_quantizer_is_enough(overload: Any) -> None:
    target = torch.ops.octav.dynamic_fake_quantize.default if overload == "default" else overload

    def function(x: Tensor) -> Tensor:
        return target(x, torch.zeros(()), integers(4, True, None), "octav", "pwl")[0].relu()

    assert seen(function, torch.randn(5), read=has_quantizers) == [True]


def test_adopting_leaves_the_graph_of_dynamo_as_it_was() -> None:
    def read(gm: fx.GraphModule) -> tuple[Any, Any]:
        def state() -> list[Any]:
            metas = [(node.op, node.name, dict(node.meta)) for node in gm.graph.nodes]
            return [graph_text(gm.graph), metas, [name for name, _ in gm.named_modules()]]

        before = state()
        adopted = prepared(gm)
        lift_hints(adopted)
        assert not set(adopted.graph.nodes) & set(gm.graph.nodes)
        return before, state()

    ((before, after),) = seen(Small(), torch.randn(2, 3, 6, 6), read=read)
    assert before == after


def test_parameters_and_buffers_have_their_names() -> None:
    def read(gm: fx.GraphModule) -> list[str | None]:
        return [state_name(node) for node in placeholders(from_dynamo(gm))]

    float_module = Small().eval()
    (names,) = seen(float_module, torch.randn(2, 3, 6, 6), read=read)
    assert names.count(None) == 1
    state = set(float_module.state_dict()) - {"stem.1.num_batches_tracked"}
    assert set(names) - {None} == state


def test_arguments_are_no_state() -> None:
    def read(gm: fx.GraphModule) -> list[bool]:
        return [info(node).state is not None for node in placeholders(from_dynamo(gm))]

    # A tensor of someone else is none of the model's either.
    elsewhere = torch.randn(3)
    float_module = model(lambda self, x, pair: x @ self.w + pair["b"] + elsewhere, w=parameter(3, 3))
    (found,) = seen(float_module, torch.randn(2, 3), {"b": torch.randn(3)}, read=read)
    assert found.count(True) == 1 and found.count(False) == 3


def test_values_are_where_passes_look_for_them() -> None:
    def read(gm: fx.GraphModule) -> bool:
        values = {node.name: fake(node) for node in from_dynamo(gm).graph.nodes if node.op != "output"}
        assert all(isinstance(value, Tensor) for value in values.values())
        return True

    assert seen(Small(), torch.randn(2, 3, 6, 6), read=read) == [True]


def test_modules_name_sites() -> None:
    def read(gm: fx.GraphModule) -> dict[str, str]:
        gm = from_dynamo(gm)
        run(gm, [canonicalize])
        return {site_of(node): op.name for node in gm.graph.nodes if (op := op_of(node)) is not None}

    (sites,) = seen(Small().eval(), torch.randn(2, 3, 6, 6), read=read)
    assert sites["stem.0"] == "conv2d"
    assert sites["head.out"] == "linear"


def test_a_module_that_is_called_twice_names_two_sites() -> None:
    def read(gm: fx.GraphModule) -> list[str]:
        gm = from_dynamo(gm)
        run(gm, [canonicalize])
        return [site_of(node) for node in gm.graph.nodes if (op := op_of(node)) is not None and op.name == "linear"]

    float_module = model(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(3, 3))
    assert seen(float_module, torch.randn(2, 3), read=read) == [["fc", "fc:1"]]


@pytest.mark.slow
def test_an_adopted_graph_computes_the_same() -> None:
    float_module, x = Small().eval(), torch.randn(2, 3, 6, 6)

    def read(gm: fx.GraphModule) -> Callable[..., Any]:
        return from_dynamo(gm)

    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(float_module, backend=lambda gm, inputs: read(gm).forward)(x)
        assert torch.equal(y, float_module(x))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        # Keys of another size have a weight of their own.
        keys = x if self.attention.kdim == 8 else x[..., : self.attention.kdim]
        return self.attention(x, keys, x, need_weights=False)[0]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6}])
def test_multi_head_attention_is_expanded(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    float_module, x = Attention(**options), torch.randn(2, 5, 8)
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        adopted = from_dynamo(gm)
        run(adopted, [canonicalize])
        graphs.append((gm, adopted))
        return adopted.forward

    y = torch.compile(float_module, backend=backend)(x)
    ((original, adopted),) = graphs
    assert F.multi_head_attention_forward in {node.target for node in original.graph.nodes}
    assert F.multi_head_attention_forward not in {node.target for node in adopted.graph.nodes}
    found = [op.name for node in adopted.graph.nodes if (op := op_of(node)) is not None]
    assert found.count("linear") >= 2 and found.count("attention") == 1
    expected = float_module(x)
    assert torch.equal(y, expected)
    seed = torch.randn_like(y)
    parameters = list(float_module.parameters())
    for a, b in zip(
        torch.autograd.grad(y, parameters, seed), torch.autograd.grad(expected, parameters, seed), strict=True
    ):
        assert torch.equal(a, b)


def test_what_attention_is_expanded_into_has_values_and_a_place() -> None:
    def read(gm: fx.GraphModule) -> list[str]:
        gm = from_dynamo(gm)
        assert all(fake(node) is not None for node in gm.graph.nodes if node.op == "call_function")
        run(gm, [canonicalize])
        return [site_of(node) for node in gm.graph.nodes if op_of(node) is not None]

    (sites,) = seen(Attention(), torch.randn(2, 5, 8), read=read)
    assert [site for site in sites if site.startswith("attention.")] == [
        "attention.linear",
        "attention.attention",
        "attention.out_proj",
    ]


def test_golden_hints_are_lifted() -> None:
    def read(gm: fx.GraphModule) -> Any:
        gm = prepared(gm)
        before = graph_text(gm.graph)
        lifted = lift_hints(gm)
        gm.graph.lint()
        return before, lifted, graph_text(gm.graph), [str(node.target) for node in placeholders(gm)], gm

    float_module = model(lambda self, x: self.b(self.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    ((before, lifted, after, inputs, gm),) = seen(float_module, torch.randn(2, 3), read=read)
    a, b = (f"l_self_modules_{name}_parameters" for name in "ab")
    assert before == (
        "quantizers_a_input = self.quantizers.a_input(l_x_)\n"
        f"quantizers_a_weight = self.quantizers.a_weight({a}_weight_)\n"
        f"linear = linear(quantizers_a_input, quantizers_a_weight, {a}_bias_)\n"
        "quantizers_b_input = self.quantizers.b_input(linear)\n"
        f"quantizers_b_weight = self.quantizers.b_weight({b}_weight_)\n"
        f"linear_1 = linear(quantizers_b_input, quantizers_b_weight, {b}_bias_)\n"
        "return (linear_1)"
    )
    spec, per_channel = "'int4/tensor', 'octav', 'pwl'", "'int4/channel.0', 'octav', 'mad'"
    assert after == (
        "as_autocast = as_autocast(l_x_)\n"
        f"dynamic_fake_quantize_default = dynamic_fake_quantize.default(as_autocast, hint_a_input, {spec})\n"
        "getitem = getitem(dynamic_fake_quantize_default, 0)\n"
        "getitem_1 = getitem(dynamic_fake_quantize_default, 1)\n"
        "copy_ = hint_a_input.copy_(getitem_1)\n"
        "dynamic_fake_quantize_default_1 = "
        f"dynamic_fake_quantize.default({a}_weight_, hint_a_weight, {per_channel})\n"
        "getitem_2 = getitem(dynamic_fake_quantize_default_1, 0)\n"
        "getitem_3 = getitem(dynamic_fake_quantize_default_1, 1)\n"
        "copy__1 = hint_a_weight.copy_(getitem_3)\n"
        f"linear = linear(getitem, getitem_2, {a}_bias_)\n"
        "as_autocast_1 = as_autocast(linear)\n"
        f"dynamic_fake_quantize_default_2 = dynamic_fake_quantize.default(as_autocast_1, hint_b_input, {spec})\n"
        "getitem_4 = getitem(dynamic_fake_quantize_default_2, 0)\n"
        "getitem_5 = getitem(dynamic_fake_quantize_default_2, 1)\n"
        "copy__2 = hint_b_input.copy_(getitem_5)\n"
        "dynamic_fake_quantize_default_3 = "
        f"dynamic_fake_quantize.default({b}_weight_, hint_b_weight, {per_channel})\n"
        "getitem_6 = getitem(dynamic_fake_quantize_default_3, 0)\n"
        "getitem_7 = getitem(dynamic_fake_quantize_default_3, 1)\n"
        "copy__3 = hint_b_weight.copy_(getitem_7)\n"
        f"linear_1 = linear(getitem_4, getitem_6, {b}_bias_)\n"
        "return (linear_1)"
    )
    # After all others, in the order of their quantizers.
    assert inputs[-4:] == ["hint_a_input", "hint_a_weight", "hint_b_input", "hint_b_weight"]
    assert list(lifted) == ["a_input", "a_weight", "b_input", "b_weight"]
    assert not hasattr(gm, QUANTIZERS)


def test_a_lifted_graph_computes_what_its_quantizers_do_and_writes_their_hints() -> None:
    x = torch.randn(2, 3)
    float_module = model(lambda self, x: self.b(self.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    results = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        gm = prepared(gm)
        expected = fx.Interpreter(gm)
        quantizers = {name: part for name, part in gm.named_modules() if isinstance(part, FakeQuantizer)}

        def both(*args: Tensor) -> Any:
            (y,) = expected.run(*args)
            clips = {name.removeprefix(QUANTIZERS + "."): part.hint.clone() for name, part in quantizers.items()}
            for part in quantizers.values():
                part.hint.zero_()
            lifted = lift_hints(gm)
            hints = [quantizer.hint for quantizer in lifted.values()]
            (found,) = gm(*args, *hints)
            results.append((found, y, dict(zip(lifted, hints, strict=True)), clips))
            return (found,)

        return both

    torch.compiler.reset()
    torch.compile(float_module, backend=backend)(x)
    ((found, y, hints, clips),) = results
    assert torch.equal(found, y)
    assert hints.keys() == clips.keys()
    assert all(torch.equal(hints[name], clips[name]) and hints[name].all() for name in hints)
    # One clip for the activation, one for each output channel of the weight.
    assert [hint.shape for hint in hints.values()] == [(), (4,), (), (2,)]


def test_hints_are_inputs_without_a_source() -> None:
    def read(gm: fx.GraphModule) -> Any:
        gm = prepared(gm)
        lifted = lift_hints(gm)
        inputs = placeholders(gm)[-len(lifted) :]
        for node, quantizer in zip(inputs, lifted.values(), strict=True):
            assert isinstance(node.meta["example_value"], FakeTensor)
            assert node.meta["example_value"].shape == quantizer.hint.shape
        # There is nothing in the user's code that a guard could look at.
        return [node._dynamo_source for node in inputs]

    ((first, *others),) = seen(Small(), torch.randn(2, 3, 6, 6), read=read)
    assert first is None and not any(others)


@pytest.mark.parametrize(
    "float_module",
    [
        nn.Sequential(nn.Linear(3, 3)),
        model(lambda self, x: self.d["a-b"](x), d=nn.ModuleDict({"a-b": nn.Linear(3, 3)})),
    ],
    ids=["number", "dash"],
)
def test_any_name_of_a_module_makes_a_name_of_a_hint(float_module: nn.Module) -> None:
    def read(gm: fx.GraphModule) -> bool:
        gm = prepared(gm)
        lift_hints(gm)
        hints = [str(node.target) for node in placeholders(gm)]
        assert all(hint.isidentifier() for hint in hints)
        return True

    assert seen(float_module, torch.randn(2, 3), read=read) == [True]
