"""rows_in_one_pass: one op for a solve of rows and the rounding to its clips, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config
from octav_fx.ir.printer import graph_text
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.passes import rows_in_one_pass, save_codes, split_quantizers
from tests.support.joint import joint, leaf, lower, targets, unchanged

octav = torch.ops.octav
BEFORE = (split_quantizers, save_codes)
TOKEN, GROUP = "int4/token.1", "e2m1/group-8.1/e8m0"

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor]]


def layer(x_spec: str = TOKEN, w_spec: str = GROUP, method: str = "octav", gradient: str = "pwl") -> Function:
    """A linear layer of tokens that are computed, and of groups of weights."""

    def of(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        levels = dynamic_fake_quantize(x.sin(), hint, x_spec, method, gradient)[0]
        return (F.linear(levels, dynamic_fake_quantize(w, hint, w_spec, method, "mad")[0]),)

    return of


def inputs(*channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(7, 32), leaf(4, 32), torch.ones(channels)


def test_golden() -> None:
    gm = joint(layer(), *inputs())
    lower(gm, *BEFORE)
    edits = lower(gm, rows_in_one_pass)
    assert [(edit.verb, edit.detail) for edit in edits] == [
        ("one pass", "with quantize_default"),
        ("one pass", "with fake_quantize_default_1"),
    ]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "quantize_rows_default = quantize_rows.default(sin, 'int4/token.1', 'octav', torch.int8, None)\n"
        "getitem_4 = getitem(quantize_rows_default, 0)\n"
        "getitem_5 = getitem(quantize_rows_default, 1)\n"
        "dequantize_default = dequantize.default(getitem_4, getitem_5, 'int4/token.1', torch.float32)\n"
        "quantize_rows_default_1 = "
        "quantize_rows.default(primals_2, 'e2m1/group-8.1/e8m0', 'octav', torch.float32, None)\n"
        "getitem_6 = getitem(quantize_rows_default_1, 0)\n"
        "getitem_7 = getitem(quantize_rows_default_1, 1)\n"
        "permute = permute.default(getitem_6, [1, 0])\n"
        "mm = mm.default(dequantize_default, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, dequantize_default)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = fake_quantize_backward.default("
        "permute_4, primals_2, getitem_7, 'e2m1/group-8.1/e8m0', 'mad')\n"
        "fake_quantize_backward_1 = fake_quantize_backward.default(mm_2, sin, getitem_5, 'int4/token.1', 'pwl')\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(fake_quantize_backward_1, cos)\n"
        "return [mm, mul, fake_quantize_backward, None]"
    )


@pytest.mark.parametrize("gradient", ["pwl", "mad", "ste"])
@pytest.mark.parametrize("method", ["octav", "max"])
def test_numbers(method: str, gradient: str) -> None:
    gm, given = joint(layer(method=method, gradient=gradient), *inputs()), inputs()
    lower(gm, *BEFORE)
    assert len(unchanged(gm, given, rows_in_one_pass)) == 2
    assert not targets(gm) & {octav.optimal_clip.default, octav.quantize.default}
    assert lower(gm, rows_in_one_pass) == []


@pytest.mark.parametrize(
    ("spec", "method"),
    [("int4/tensor", "max"), ("int4/channel.0", "octav"), (TOKEN, "octav-grid"), (TOKEN, "percentile")],
)
def test_what_no_kernel_does_at_once_stays(spec: str, method: str) -> None:
    given = inputs(7) if "channel" in spec else inputs()
    gm = joint(lambda x, w, hint: (dynamic_fake_quantize(x.sin(), hint, spec, method, "pwl")[0],), *given)
    lower(gm, *BEFORE)
    assert lower(gm, rows_in_one_pass) == []


def test_float64_stays() -> None:
    x, w, hint = inputs()
    gm = joint(layer(), x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), hint)
    lower(gm, *BEFORE)
    assert lower(gm, rows_in_one_pass) == []


def test_a_clip_of_something_else_stays() -> None:
    def of(x: Tensor, y: Tensor) -> tuple[Tensor]:
        clip = octav.optimal_clip(x.detach(), torch.zeros(()), TOKEN, "max")
        return (octav.fake_quantize(y, clip, TOKEN, "ste"),)

    assert lower(joint(of, leaf(3, 8), leaf(3, 8)), rows_in_one_pass) == []


# Where Inductor cannot plan the memory of several results the op allocates them.
@pytest.mark.compile
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_compiled_step_is_the_step_in_eager(is_planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_planned:
        monkeypatch.setattr("octav_fx.backend.inductor.writes_several", lambda: False)
    config = Config.preset("w4a8-g32-token")
    model = octav_fx.quantize(
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(4, 32), config
    )
    options = {"inductor": {"fx_graph_cache": False}}
    compiled = torch.compile(model, backend="octav", dynamic=True, options=options)
    for batch in (4, 6):
        x = torch.randn(batch, 32)
        found, expected = compiled(x), model(x)
        # As sums of float32 differ in order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
