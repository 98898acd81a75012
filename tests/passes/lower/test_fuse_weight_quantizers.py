"""fuse_weight_quantizers: forward reads weights quantized together, backward rounds them one by one as before."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx import quantize
from octav_fx.backend import entry
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run
from octav_fx.ir.printer import graph_text
from octav_fx.passes import (
    LOWER,
    fuse_weight_quantizers,
    integer_matmul,
    levels_as_read,
    lower_passes,
    save_codes,
    split_quantizers,
)
from tests.support.joint import joint, kept, leaf, lower, quantized, targets, unchanged, weight
from tests.support.matmuls import forced, fuse_anywhere

octav = torch.ops.octav


def mlp(x: Tensor, w: Tensor, v: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor]:
    return (F.linear(F.linear(x, weight(w, h)).relu(), weight(v, k, bits=8)),)


def inputs() -> tuple[Tensor, ...]:
    return leaf(7, 30), leaf(20, 30), leaf(4, 20), torch.ones(20), torch.zeros(4)


def gathered(edits: list[Edit]) -> int:
    return sum(edit.verb == "gather" for edit in edits)


def test_golden() -> None:
    gm = joint(mlp, *inputs())
    lower(gm, split_quantizers, save_codes)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, fuse_anywhere)] == [
        ("primals_2", "gather", "4 bits"),
        ("primals_3", "gather", "8 bits"),
    ]
    text = graph_text(gm.graph)
    assert text.startswith(
        "fake_quantize_weights_default = fake_quantize_weights.default("
        "[primals_2, primals_3], [primals_4, primals_5], ['int4/channel.0', 'int8/channel.0'], 'octav', None)\n"
        "getitem_4 = getitem(fake_quantize_weights_default, 0)\n"
        "getitem_5 = getitem(fake_quantize_weights_default, 1)\n"
        "getitem_6 = getitem(getitem_4, 0)\n"
        "getitem_7 = getitem(getitem_4, 1)\n"
        "slice_tensor = slice.Tensor(getitem_5, 0, 0, 20)\n"
        "slice_tensor_1 = slice.Tensor(getitem_5, 0, 20, 24)\n"
        "fake_quantize_default = fake_quantize.default(primals_2, slice_tensor, 'int4/channel.0', 'mad', None)\n"
        "permute_10 = permute.default(getitem_6, [1, 0])\n"
        "permute = permute.default(fake_quantize_default, [1, 0])\n"
        "mm = mm.default(primals_1, permute_10)\n"
    )
    assert "mm_3 = mm.default(tangents_1, permute_4)\n" in text
    assert "permute_4 = permute.default(permute_1, [1, 0])\n" in text
    assert "permute_1 = permute.default(fake_quantize_default_1, [1, 0])\n" in text


def test_no_output_and_no_gradient_changes() -> None:
    arguments = inputs()
    assert gathered(unchanged(joint(mlp, *arguments), arguments, split_quantizers, save_codes, fuse_anywhere)) == 2


def test_backward_keeps_clips_and_no_levels() -> None:
    gm = joint(mlp, *inputs())
    lower(gm, split_quantizers, save_codes, fuse_anywhere)
    assert set(kept(gm)) == {"slice_tensor", "slice_tensor_1", "relu"}


def test_every_value_has_its_fake_value() -> None:
    gm = joint(mlp, *inputs())
    lower(gm, split_quantizers, save_codes, fuse_anywhere)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")


def test_a_weight_that_is_read_twice() -> None:
    def tied(x: Tensor, w: Tensor, v: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor]:
        y = weight(w, h)
        return (F.linear(F.linear(x, y), y) + weight(v, k).sum(),)

    arguments = (leaf(7, 20), leaf(20, 20), leaf(4, 20), torch.ones(20), torch.zeros(4))
    assert gathered(unchanged(joint(tied, *arguments), arguments, split_quantizers, save_codes, fuse_anywhere)) == 2


def test_levels_in_the_dtype_that_is_read() -> None:
    def halved(x: Tensor, w: Tensor, v: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor]:
        y, z = (torch.ops.aten._to_copy(weight(of, hint), dtype=torch.bfloat16) for of, hint in ((w, h), (v, k)))
        return (F.linear(F.linear(x.bfloat16(), y).relu(), z),)

    arguments = inputs()
    gm = joint(halved, *arguments)
    assert gathered(unchanged(gm, arguments, split_quantizers, save_codes, levels_as_read, fuse_anywhere)) == 2
    (both,) = gm.graph.find_nodes(op="call_function", target=octav.fake_quantize_weights.default)
    assert [levels.dtype for levels in both.meta["val"][0]] == [torch.bfloat16] * 2


def test_a_single_weight_stays() -> None:
    def alone(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor]:
        return (F.linear(x, weight(w, h)),)

    arguments = (leaf(7, 20), leaf(3, 20), torch.ones(3))
    assert not gathered(unchanged(joint(alone, *arguments), arguments, split_quantizers, save_codes, fuse_anywhere))


def test_a_weight_that_is_computed_stays() -> None:
    def scaled(x: Tensor, w: Tensor, v: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor]:
        return (F.linear(F.linear(x, weight(2 * w, h)), weight(v, k)),)

    arguments = inputs()
    assert not gathered(unchanged(joint(scaled, *arguments), arguments, split_quantizers, save_codes, fuse_anywhere))


def test_levels_that_only_backward_reads_stay() -> None:
    # Forward multiplies codes: integer_matmul.
    def both(x: Tensor, w: Tensor, v: Tensor, h: Tensor, k: Tensor, hint: Tensor) -> tuple[Tensor]:
        y = F.linear(quantized(x.sin(), hint), weight(w, h))
        return (F.linear(quantized(y, hint), weight(v, k)),)

    gm = joint(both, *inputs(), torch.ones(()))
    assert not gathered(lower(gm, split_quantizers, save_codes, forced, fuse_anywhere))


def test_it_comes_after_those_that_replace_levels_and_is_for_gpus() -> None:
    arguments = inputs()
    assert LOWER.index(fuse_weight_quantizers) > LOWER.index(integer_matmul)
    assert not gathered(
        unchanged(joint(mlp, *arguments), arguments, split_quantizers, save_codes, fuse_weight_quantizers)
    )


@pytest.mark.compile
def test_inductor_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "lower_passes", lambda **options: (*lower_passes(**options), fuse_anywhere))
    ran = []
    monkeypatch.setattr(entry, "run", lambda gm, passes: ran.extend(run(gm, passes)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    x = torch.randn(7, 30)
    q = quantize(model, x)
    expected = torch.autograd.grad(q(x).square().sum(), list(q.parameters()))
    compiled = torch.compile(q, backend="octav")
    found = torch.autograd.grad(compiled(x).square().sum(), list(q.parameters()))
    assert gathered(ran) == 2
    for gradient, same in zip(found, expected, strict=True):
        # Inductor's kernels sum in another order than eager ones.
        torch.testing.assert_close(gradient, same)


def test_without_a_backward_nothing_is_left_of_the_single_quantizers() -> None:
    arguments = tuple(tensor.detach() for tensor in inputs())
    with torch.no_grad():
        gm = joint(mlp, *arguments, trace_joint=False)
    assert gathered(unchanged(gm, arguments, split_quantizers, fuse_anywhere)) == 2
    assert not {octav.optimal_clip.default, octav.fake_quantize.default} & targets(gm)
