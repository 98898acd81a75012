"""What torch's functions make of fake tensors, remembered: as they make it, sizes, strides and shared memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.symbolic import remembered
from octav_fx.capture.symbolic.trace import capture
from octav_fx.compat.tensors import FakeTensorMode, pytree, storage_id
from octav_fx.ir.meta import fake, info


class Blocks(nn.Module):
    """Two equal blocks; what is written in the first is written in the second."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return [self.block(self, x), self.block(self, x + 1)]


def shared(b: Blocks, x: Tensor) -> Any:
    parts = x.flatten(2).transpose(1, 2).chunk(2, -1)
    return b.norm(b.conv(x)), parts, parts[1].contiguous(), x.contiguous(), x[:, :2].unbind(1)


def written(b: Blocks, x: Tensor) -> Any:
    x = x.clone()
    x[:, 0] = 1
    y = F.relu(x, inplace=True)
    y.mul_(2).transpose_(2, 3)
    return y, y.max(2), F.dropout(y, 0.5, b.training)


def of_kinds(b: Blocks, x: Tensor) -> Any:
    half = x.half()
    with torch.autocast("cpu", torch.bfloat16):
        low = x.flatten(1) @ x.flatten(1).T
    is_more = x > 0
    counts = is_more * True, is_more * 1, is_more * 1.0, x.sum(1, True), x.sum(1, False)
    return half.float(), low, x.flatten(1) @ x.flatten(1).T, counts


def of_one_memory(b: Blocks, x: Tensor) -> Any:
    y = x + 1
    return torch.broadcast_tensors(x, x), torch.broadcast_tensors(x, y), torch.broadcast_tensors(y, y.view_as(x))


def attended(b: Blocks, x: Tensor) -> Any:
    rows = x.flatten(2)
    return F.scaled_dot_product_attention(rows, rows, rows), torch.einsum("bcs,bds->bcd", rows, rows), rows.view(-1)


def moved(b: Blocks, x: Tensor) -> Any:
    y, z = torch.empty_like(x), x * 2
    y.set_(z)
    return y, y.view(-1), z


def of_inference(b: Blocks, x: Tensor) -> Any:
    outside = x * 2
    with torch.inference_mode():
        y, view = x * 2, x.view(-1)
        kinds = y.is_inference(), view.is_inference()
    return kinds, outside.is_inference(), outside.view(-1).is_inference(), y.is_inference()


def described(graph: fx.Graph) -> list[Any]:
    memory: dict[int, int] = {}

    def kind(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        same = memory.setdefault(storage_id(leaf), len(memory))
        return leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad, same

    return [(n.name, info(n).macs, [*map(kind, pytree.tree_leaves(fake(n)))]) for n in graph.nodes]


@pytest.mark.slow
@pytest.mark.parametrize("block", [shared, written, of_kinds, of_one_memory, attended, moved, of_inference])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_remembered_is_what_is_computed(block: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = Blocks(block).train(training), {"x": torch.randn(2, 4, 6, 8)}
    with monkeypatch.context() as patch:
        patch.setattr(remembered.Call, "known", lambda *_: None)
        expected = described(capture(model, arguments).graph)
    remembered._KNOWN.clear()
    assert described(capture(model, arguments).graph) == expected
    found = len(remembered._KNOWN)
    assert described(capture(model, arguments).graph) == expected
    assert len(remembered._KNOWN) == found > 0


def of_layer(layer: nn.Module) -> Any:
    """Capture one layer, and return what it makes of the example."""
    graph = capture(nn.Sequential(layer), {"input": torch.randn(2, 4, 6, 8)}).graph
    return next(fake(node) for node in graph.find_nodes(op="call_module")).shape


def test_a_setting_of_a_layer_tells_it_from_another_one() -> None:
    assert of_layer(nn.AvgPool2d(2)) == (2, 4, 3, 4)
    assert of_layer(nn.AvgPool2d(2, ceil_mode=True, padding=1)) == (2, 4, 4, 5)
    assert of_layer(nn.Conv2d(4, 5, 3)) == (2, 5, 4, 6)
    assert of_layer(nn.Conv2d(4, 5, 3, padding="same")) == (2, 5, 6, 8)


def test_layers_with_parts_and_functions_of_others_are_evaluated_each_time() -> None:
    def is_known(node: fx.Node, layer: nn.Module | None) -> bool:
        mode = FakeTensorMode()
        return remembered.Call(node, layer, (mode.from_tensor(torch.ones(2)),), {}).key is not None

    graph = fx.Graph()
    x = graph.placeholder("x")
    assert is_known(graph.call_function(torch.relu, (x,)), None)
    assert is_known(graph.call_method("relu", (x,)), None)
    assert not is_known(graph.call_function(described, (x,)), None)
    assert not is_known(graph.call_function(torch.ops.aten.relu, (x,)), None)
    layer = graph.call_module("layer", (x,))
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    assert is_known(layer, nn.ReLU())
    assert not any(is_known(layer, other) for other in (hooked, nn.Sequential(nn.ReLU()), Blocks(shared)))


def test_what_is_remembered_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MOST", 3)
    remembered._KNOWN.clear()
    capture(Blocks(shared), {"x": torch.randn(2, 4, 6, 8)})
    assert 0 < len(remembered._KNOWN) <= 3


def test_a_layer_that_does_not_ask_for_its_mode_is_evaluated_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(remembered, "_KNOWN", known)
    made = []
    for mode in (False, True):
        for layer in (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)):
            capture(nn.Sequential(layer).train(mode), {"input": torch.randn(2, 4, 6, 6)})
            made.append(len(known))
    assert made == [1, 2, 2, 3]


class Reads(nn.Module):
    """Forward reads tensors that share memory, in another order, and one that is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).t())
        self.register_buffer("tied", self.weight.data)
        self.register_buffer("part", torch.zeros(8)[:4])
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.tied + self.weight + self.part[:1] + self.count


def test_fake_tensors_of_state_are_as_torch_makes_them() -> None:
    model = Reads()
    graph = capture(model, {"x": torch.randn(4, 3)}).graph
    found = {str(node.target): fake(node) for node in graph.find_nodes(op="get_attr")}
    assert found.keys() == {"weight", "tied", "part", "count"}
    mode = FakeTensorMode()
    for name, value in found.items():
        tensor = getattr(model, name)
        expected = mode.from_tensor(tensor)
        for fact in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(value, fact) == getattr(expected, fact), (name, fact)
        assert value.stride() == expected.stride()
        assert value.storage_offset() == expected.storage_offset()
        assert isinstance(value, nn.Parameter) == isinstance(tensor, nn.Parameter)
    memories = [storage_id(found[name]) for name in ("weight", "tied", "part", "count")]
    assert memories[0] == memories[1]
    assert len(set(memories)) == 3
