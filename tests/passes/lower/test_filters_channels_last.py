"""filters_channels_last: weights of convolutions are quantized into the layout that they are read in, or stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.formats.spec import integers
from octav_fx.ir.printer import graph_text
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.passes import filters_channels_last, lower_passes, save_codes, split_quantizers
from tests.support.joint import joint, leaf, lower, tagged, targets, unchanged, weight

octav = torch.ops.octav
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="Inductor leaves layouts alone")


def conv(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.conv2d(x, weight(w, hint)),)


def arguments(*shape: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """An input for it, a weight of this shape, and its hints."""
    return leaf(2, shape[1] * groups, *(7 for _ in shape[2:])), leaf(*shape), torch.ones(shape[0])


def half_lowered(function: Callable[..., tuple[Tensor]], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    gm = joint(function, *inputs)
    lower(gm, split_quantizers, save_codes)
    return gm


def test_golden() -> None:
    gm = half_lowered(conv, arguments(4, 3, 2, 5))
    geometry = "[1, 1], [0, 0], [1, 1], False, [0, 0], 1"
    assert graph_text(gm.graph) == (
        "optimal_clip_default = optimal_clip.default(primals_2, primals_3, 'int4/channel.0', 'octav')\n"
        "fake_quantize_default = fake_quantize.default(primals_2, optimal_clip_default, "
        "'int4/channel.0', 'mad', None)\n"
        f"convolution = convolution.default(primals_1, fake_quantize_default, None, {geometry})\n"
        "convolution_backward = convolution_backward.default("
        f"tangents_1, primals_1, fake_quantize_default, [0], {geometry}, [True, True, False])\n"
        "getitem_2 = getitem(convolution_backward, 0)\n"
        "getitem_3 = getitem(convolution_backward, 1)\n"
        "fake_quantize_backward = "
        "fake_quantize_backward.default(getitem_3, primals_2, optimal_clip_default, 'int4/channel.0', 'mad')\n"
        "return [convolution, getitem_2, fake_quantize_backward, None]"
    )
    edits = lower(gm, filters_channels_last)
    assert [(edit.node, edit.verb, edit.detail) for edit in edits] == [
        ("primals_2", "channels last", "fake_quantize_default")
    ]
    assert graph_text(gm.graph) == (
        "as_strided_default = as_strided.default(primals_2, [4, 3, 10], [30, 10, 1])\n"
        "optimal_clip_default = optimal_clip.default(as_strided_default, primals_3, 'int4/channel.0', 'octav')\n"
        "fake_quantize_filters_default = "
        "fake_quantize_filters.default(as_strided_default, optimal_clip_default, 'int4/channel.0', None)\n"
        "view_default = view.default(fake_quantize_filters_default, [4, 2, 5, 3])\n"
        "permute_default = permute.default(view_default, [0, 3, 1, 2])\n"
        f"convolution = convolution.default(primals_1, permute_default, None, {geometry})\n"
        "convolution_backward = convolution_backward.default("
        f"tangents_1, primals_1, permute_default, [0], {geometry}, [True, True, False])\n"
        "getitem_2 = getitem(convolution_backward, 0)\n"
        "getitem_3 = getitem(convolution_backward, 1)\n"
        "fake_quantize_filters_backward_default = fake_quantize_filters_backward.default("
        "getitem_3, as_strided_default, optimal_clip_default, 'int4/channel.0', 'mad')\n"
        "view_default_1 = view.default(fake_quantize_filters_backward_default, [4, 3, 2, 5])\n"
        "return [convolution, getitem_2, view_default_1, None]"
    )


def test_the_fake_values_say_what_the_values_are() -> None:
    gm = half_lowered(conv, arguments(4, 3, 2, 5))
    lower(gm, filters_channels_last)
    (y,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    assert y.meta["val"].shape == (4, 3, 2, 5)
    assert y.meta["val"].is_contiguous(memory_format=torch.channels_last)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")


def quantizer(gradient: str, signed: bool) -> Callable[..., tuple[Tensor]]:
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(x, dynamic_fake_quantize(w, hint, integers(4, signed, 0), "octav", gradient)[0], padding=1),)

    return function


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (1, 2, 1, 5), (5, 17, 2, 1), (8, 8, 3, 3)])
def test_codes_and_gradients_of_the_weight_stay_what_they_are(
    gradient: str, signed: bool, shape: tuple[int, ...]
) -> None:
    inputs = arguments(*shape)
    gm = half_lowered(quantizer(gradient, signed), inputs)
    # oneDNN adds up in another order for another layout: what goes into the convolution and its gradient is the same.
    with torch.no_grad():
        clip = octav.optimal_clip(inputs[1], inputs[2], integers(4, signed, 0), "octav")
        expected = octav.fake_quantize(inputs[1], clip, integers(4, signed, 0), gradient)
    before = Recorded(gm).run(*inputs, torch.ones(before_shape(gm)))
    assert len(lower(gm, filters_channels_last)) == 1
    after = Recorded(gm).run(*inputs, torch.ones(before_shape(gm)))
    assert torch.equal(before.weight, expected) and torch.equal(after.weight, expected)
    assert after.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(after.gradient, before.gradient)


def before_shape(gm: fx.GraphModule) -> torch.Size:
    (tangent,) = (node for node in gm.graph.find_nodes(op="placeholder") if "tangents" in str(node.target))
    return tangent.meta["val"].shape


class Recorded(fx.Interpreter):
    """Runs a graph with a gradient of convolution that does not depend on a layout; keeps what is asked about."""

    weight: Tensor
    gradient: Tensor

    def run(self, *args: Tensor) -> "Recorded":
        with torch.no_grad():
            self.gradient = super().run(*args)[2]
        return self

    def call_function(self, target, args, kwargs):
        if target is torch.ops.aten.convolution_backward.default:
            x, self.weight = args[1:3]
            values = torch.linspace(-1, 1, self.weight.numel())
            return x, values.view(self.weight.shape), None
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_outputs_and_gradients_of_sums_without_rounding_stay_what_they_are(gradient: str) -> None:
    # Inputs and weights are small integers and the clip 8: a sum is the same in any order.
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(x, dynamic_fake_quantize(w, hint, integers(4, True, 0), "max", gradient)[0], padding=1),)

    x = torch.randint(-8, 8, (2, 3, 7, 7)).float().requires_grad_()
    w = torch.randint(-8, 8, (4, 3, 3, 3)).float()
    w[:, 0, 0, 0] = -8
    inputs = (x, w.requires_grad_(), torch.ones(4))
    gm = half_lowered(function, inputs)
    before = exact(gm, inputs)
    assert len(lower(gm, filters_channels_last)) == 1
    for found, expected in zip(exact(gm, inputs), before, strict=True):
        assert torch.equal(found, expected)


def exact(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    gradient = torch.randint(-8, 8, before_shape(gm), generator=torch.Generator().manual_seed(2)).float()
    with torch.no_grad():
        return [result for result in gm(*inputs, gradient) if result is not None]


def transposed(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    """Its output channels are in dimension 1."""
    y = dynamic_fake_quantize(w, hint, integers(4, True, 1), "octav", "mad")[0]
    return (F.conv_transpose2d(x, y),)


def another_reader(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    y = weight(w, hint)
    return (F.conv2d(x, y).sum() + y.sum(),)


def per_tensor(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.conv2d(x, dynamic_fake_quantize(w, hint, integers(4, True, None), "octav", "mad")[0]),)


def computed(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.conv2d(x, weight(w * 2, hint)),)


def channels_last(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
    return x, w.detach().to(memory_format=torch.channels_last).requires_grad_(), hint


STAY: dict[str, tuple[Callable[..., tuple[Tensor]], tuple[Tensor, ...]]] = {
    "one position": (conv, arguments(4, 3, 1, 1)),
    "depthwise": (lambda x, w, hint: (F.conv2d(x, weight(w, hint), groups=4),), arguments(4, 1, 3, 3, groups=4)),
    "one input channel": (conv, arguments(4, 1, 3, 3)),
    "linear": (lambda x, w, hint: (F.linear(x, weight(w, hint)),), (leaf(2, 3), leaf(4, 3), torch.ones(4))),
    "channels last already": (conv, channels_last(*arguments(4, 3, 3, 3))),
    "conv1d": (lambda x, w, hint: (F.conv1d(x, weight(w, hint)),), arguments(4, 3, 3)),
    "conv3d": (lambda x, w, hint: (F.conv3d(x, weight(w, hint)),), arguments(4, 3, 3, 3, 3)),
    "transposed": (transposed, (leaf(2, 4, 7, 7), leaf(4, 3, 3, 3), torch.ones(3))),
    "another reader": (another_reader, arguments(4, 3, 3, 3)),
    "one clip": (per_tensor, (*arguments(4, 3, 3, 3)[:2], torch.ones(()))),
    "computed": (computed, arguments(4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", STAY)
def test_what_does_not_gain_stays(name: str) -> None:
    function, inputs = STAY[name]
    gm = half_lowered(function, inputs)
    text = graph_text(gm.graph)
    assert lower(gm, filters_channels_last) == []
    assert graph_text(gm.graph) == text


def test_before_the_split_there_is_nothing_to_do() -> None:
    assert lower(joint(conv, *arguments(4, 3, 3, 3)), filters_channels_last) == []


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_layouts_are_left_alone() -> None:
    gm = half_lowered(conv, arguments(4, 3, 3, 3))
    with torch.backends.mkldnn.flags(enabled=False):
        assert lower(gm, filters_channels_last) == []


def test_grouped_convolutions_have_filters_too() -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(x, weight(w, hint), groups=2),)

    gm = half_lowered(function, arguments(4, 3, 3, 3, groups=2))
    assert len(lower(gm, filters_channels_last)) == 1


def test_a_weight_of_two_convolutions_is_quantized_once() -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        y = weight(w, hint)
        return (F.conv2d(x, y) + F.conv2d(x.sin(), y),)

    gm = half_lowered(function, arguments(4, 3, 3, 3))
    assert len(lower(gm, filters_channels_last)) == 1
    assert graph_text(gm.graph).count("fake_quantize_filters.default") == 1


def test_two_quantizers_of_one_weight() -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(x, weight(w, hint, 4)) + F.conv2d(x.sin(), weight(w, hint, 8)),)

    gm = half_lowered(function, arguments(4, 3, 3, 3))
    assert len(lower(gm, filters_channels_last)) == 2
    assert octav.fake_quantize_backward.default not in targets(gm)


def test_a_frozen_weight_needs_no_gradient() -> None:
    x, w, hint = arguments(4, 3, 3, 3)
    gm = half_lowered(conv, (x, w.detach(), hint))
    assert len(lower(gm, filters_channels_last)) == 1
    assert octav.fake_quantize_filters_backward.default not in targets(gm)


def test_what_is_recomputed_stays_so() -> None:
    gm = half_lowered(conv, arguments(4, 3, 3, 3))
    assert list(tagged(gm)) == ["fake_quantize_default"]
    (tag,) = tagged(gm).values()
    lower(gm, filters_channels_last)
    assert tagged(gm) == dict.fromkeys(["fake_quantize_filters_default", "view_default", "permute_default"], tag)
    assert {node.meta["ac_graph_id"] for node in gm.graph.nodes if "recompute" in node.meta} == {0}


def test_what_is_not_recomputed_stays_so() -> None:
    x, w, hint = arguments(4, 3, 3, 3)
    gm = half_lowered(conv, (x.detach(), w, hint))
    tags = tagged(gm)
    lower(gm, filters_channels_last)
    assert bool(tagged(gm)) == bool(tags)


def test_twice_changes_nothing() -> None:
    gm = half_lowered(conv, arguments(4, 3, 3, 3))
    assert len(lower(gm, filters_channels_last)) == 1
    text = graph_text(gm.graph)
    assert lower(gm, *lower_passes()) == []
    assert graph_text(gm.graph) == text


def test_a_whole_graph_twice() -> None:
    gm = joint(conv, *arguments(4, 3, 3, 3))
    assert len(lower(gm, *lower_passes())) == 3
    text = graph_text(gm.graph)
    assert unchanged(gm, arguments(4, 3, 3, 3), *lower_passes()) == []
    assert graph_text(gm.graph) == text
