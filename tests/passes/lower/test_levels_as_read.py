"""levels_as_read: levels and gradients under autocast are written and read in half precision, with the same values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.absent_gpu import move
from octav_fx.formats.spec import integers
from octav_fx.ir.printer import graph_text
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.passes import LOWER, filters_channels_last, levels_as_read, lower_passes, save_codes, split_quantizers
from tests.support.joint import joint, leaf, lower, quantized, results, targets, weight

octav, aten = torch.ops.octav, torch.ops.aten
HALF = [torch.bfloat16, torch.float16]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast calls; Tensor.to leaves a check of the dtype in the graph."""
    return aten._to_copy(x, dtype=dtype)


def product(x: Tensor, w: Tensor, hint: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor]:
    return (cast(x, dtype) @ cast(weight(w, hint), dtype),)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return leaf(3, 4), leaf(4, 5), torch.ones(4)


def test_golden() -> None:
    gm = joint(product, torch.randn(3, 4), *arguments()[1:])
    lower(gm, split_quantizers, save_codes)
    solve = "optimal_clip_default = optimal_clip.default(primals_2, primals_3, 'int4/channel.0', 'octav')\n"
    assert solve in graph_text(gm.graph)
    edits = lower(gm, levels_as_read)
    assert [(edit.verb, edit.detail) for edit in edits] == [
        ("levels as read", "torch.bfloat16"),
        ("gradient as it comes", "mm_1"),
    ]
    assert graph_text(gm.graph) == (
        "convert_element_type = convert_element_type.default(primals_1, torch.bfloat16)\n"
        f"{solve}"
        "fake_quantize_default_1 = "
        "fake_quantize.default(primals_2, optimal_clip_default, 'int4/channel.0', 'mad', torch.bfloat16)\n"
        "mm = mm.default(convert_element_type, fake_quantize_default_1)\n"
        "permute = permute.default(convert_element_type, [1, 0])\n"
        "mm_1 = mm.default(permute, tangents_1)\n"
        "fake_quantize_backward = "
        "fake_quantize_backward.default(mm_1, primals_2, optimal_clip_default, 'int4/channel.0', 'mad')\n"
        "return [mm, None, fake_quantize_backward, None]"
    )


@pytest.mark.parametrize("dtype", HALF)
def test_no_value_changes(dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor, of_x: Tensor) -> tuple[Tensor]:
        # The activation is float32 and read in half precision, by forward and by the gradient of the weight.
        y = quantized((x * 2).relu(), of_x, signed=False)
        return (cast(y, dtype) @ cast(weight(w, hint), dtype),)

    inputs = (*arguments(), torch.tensor(1.0))
    gm = joint(function, *inputs)
    lower(gm, split_quantizers, save_codes)
    expected = results(gm, inputs)
    edits = lower(gm, levels_as_read)
    assert [edit.verb for edit in edits] == ["levels as read"] * 2 + ["gradient as it comes"] * 2
    for found, before in zip(results(gm, inputs), expected, strict=True):
        assert (found is None and before is None) or torch.equal(found, before)
    levels = [node for node in gm.graph.nodes if node.target in (octav.fake_quantize.default, octav.dequantize.default)]
    assert [node.meta["val"].dtype for node in levels] == [dtype] * 2
    assert all("recompute" in node.meta for node in levels)


def test_a_second_time_changes_nothing() -> None:
    gm = joint(product, *arguments())
    lower(gm, split_quantizers, save_codes, levels_as_read)
    before = graph_text(gm.graph)
    assert lower(gm, levels_as_read) == []
    assert graph_text(gm.graph) == before


def read_twice(first: torch.dtype, second: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
        y = weight(w, hint)
        return tuple(cast(x, dtype) @ cast(y, dtype) for dtype in (first, second))

    return function


STAYS = {
    "read in float32, too": read_twice(torch.bfloat16, torch.float32),
    "read in two dtypes": read_twice(torch.bfloat16, torch.float16),
    "read in float64": read_twice(torch.float64, torch.float64),
    "read as it is": lambda x, w, hint: (x @ weight(w, hint),),
    # A level of bfloat16 is rounded to it before it becomes one of float32.
    "half precision read in float32": lambda x, w, hint: (
        x @ cast(weight(cast(w, torch.bfloat16), hint), torch.float32),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAYS)
def test_levels_stay_where(name: str) -> None:
    gm = joint(STAYS[name], *arguments())
    lower(gm, split_quantizers, save_codes)
    assert [edit for edit in lower(gm, levels_as_read) if edit.verb == "levels as read"] == []


def test_on_a_gpu_only_levels_of_what_is_no_code() -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor, of_x: Tensor) -> tuple[Tensor]:
        y = quantized((x * 2).relu(), of_x, signed=False)
        return (cast(y, torch.bfloat16) @ cast(weight(w, hint), torch.bfloat16),)

    gm = joint(function, *arguments(), torch.tensor(1.0))
    lower(gm, split_quantizers, save_codes)
    move(gm.graph)
    assert [edit.verb for edit in lower(gm, levels_as_read)] == ["levels as read"]
    (levels,) = gm.graph.find_nodes(op="call_function", target=octav.dequantize.default)
    assert levels.meta["val"].dtype is torch.float32


def test_frozen_quantizers_and_graphs_for_inference() -> None:
    def function(x: Tensor, w: Tensor, clip: Tensor) -> tuple[Tensor]:
        return (cast(x, torch.bfloat16) @ cast(fake_quantize(w, clip, integers(4, True, 0), "pwl"), torch.bfloat16),)

    inputs = tuple(x.detach() for x in arguments())
    gm = joint(function, *inputs, trace_joint=False)
    expected = results(gm, inputs)
    assert [edit.verb for edit in lower(gm, levels_as_read)] == ["levels as read"]
    assert torch.equal(results(gm, inputs)[0], expected[0])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="Inductor leaves layouts alone")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="here aten convolves bfloat16, and sums in it",
)
def test_filters_then_lie_as_convolutions_read_them() -> None:
    def conv(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(cast(x, torch.bfloat16), cast(weight(w, hint), torch.bfloat16)),)

    inputs = leaf(2, 3, 7, 7), leaf(4, 3, 2, 5), torch.ones(4)
    gm = joint(conv, *inputs)
    expected = results(gm, inputs)
    edits = lower(gm, *lower_passes())
    assert "channels last" in [edit.verb for edit in edits]
    assert filters_channels_last in LOWER
    (y,) = gm.graph.find_nodes(op="call_function", target=octav.fake_quantize_filters.default)
    assert y.meta["val"].dtype is torch.bfloat16
    assert octav.fake_quantize_filters_backward.default in targets(gm)
    for found, before in zip(results(gm, inputs), expected, strict=True):
        # oneDNN sums a convolution of another layout in another order, then rounds to 8 bits: one of these may differ.
        torch.testing.assert_close(found, before, rtol=2**-7, atol=1e-2)
