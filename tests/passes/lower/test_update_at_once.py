"""update_at_once: hints, means and steps of all quantizers are written by three launches."""

import functools

import pytest
import torch
from torch import Tensor, fx

from octav_fx.formats.spec import integers
from octav_fx.ir.edits import Edit
from octav_fx.ir.printer import graph_text
from octav_fx.passes import update_at_once
from octav_fx.passes.lower import update_at_once as module
from tests.support.joint import lower

octav, aten = torch.ops.octav, torch.ops.aten
on_cpu = functools.partial(update_at_once, device="cpu")


def updated(x: Tensor, w: Tensor, *states: Tensor) -> Tensor:
    """What AOTAutograd leaves of two quantizers of data and of one by channel."""
    h1, m1, t1, h2, m2, t2, h3 = states
    c1, c2 = (octav.optimal_clip(of, h, integers(4, True, None), "octav") for of, h in ((x, h1), (2 * x, h2)))
    c3 = octav.optimal_clip(w, h3, integers(4, True, 0), "octav")
    for h, c in ((h1, c1), (h2, c2), (h3, c3)):
        aten.copy_(h, c)
    for m, c in ((m1, c1), (m2, c2)):
        aten.copy_(m, aten.add(m, aten.sub(c, m), alpha=0.1))
    for t in (t1, t2):
        aten.copy_(t, aten.add(t, 1))
    return c1 + c2


def arguments() -> list[Tensor]:
    torch.manual_seed(0)
    scalars = [torch.rand(()) for _ in range(6)]
    return [torch.randn(9, 5), torch.randn(3, 5), *scalars, torch.zeros(3)]


def graph_of(function=updated) -> fx.GraphModule:
    gm = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*arguments())
    return gm


def test_golden() -> None:
    gm = graph_of()
    edits = [(edit.verb, edit.detail) for edit in lower(gm, on_cpu)]
    assert edits == [
        ("update at once", "3 hints"),
        ("update at once", "2 means"),
        ("update at once", "2 counts"),
    ]
    text = graph_text(gm.graph)
    assert "_foreach_mul_scalar = _foreach_mul.Scalar([optimal_clip, optimal_clip_1, optimal_clip_2], 1.0)\n" in text
    assert "_foreach_sub_list = _foreach_sub.List([optimal_clip, optimal_clip_1], [arg3_1, arg6_1])\n" in text
    assert "_foreach_add_scalar = _foreach_add.Scalar([arg4_1, arg7_1], 1.0)\n" in text


@pytest.mark.parametrize("at_once", [2, 64])
def test_every_state_is_what_it_was(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    before, after = arguments(), arguments()
    gm = graph_of()
    expected = gm(*before)
    assert lower(gm, on_cpu)
    assert torch.equal(gm(*after), expected)
    for found, of in zip(after, before, strict=True):
        assert torch.equal(found, of)


def test_a_second_time_changes_nothing() -> None:
    gm = graph_of()
    lower(gm, on_cpu)
    text = graph_text(gm.graph)
    assert lower(gm, on_cpu) == []
    assert graph_text(gm.graph) == text


def test_what_is_not_ours_stays() -> None:
    def others(x: Tensor, w: Tensor, *states: Tensor) -> Tensor:
        h1, m1, t1, h2, m2, *_ = states
        # A mean of something else, a step of two, a state that is no clip.
        for m in (m1, m2):
            aten.copy_(m, aten.add(m, aten.sub(x.mean(), m), alpha=0.1))
        for t in (t1, h1):
            aten.copy_(t, aten.add(t, 2))
        aten.copy_(h2, x.max())
        return x

    gm = graph_of(others)
    before = graph_text(gm.graph)
    assert lower(gm, on_cpu) == []
    assert graph_text(gm.graph) == before


def test_another_device_is_not_looked_at() -> None:
    edits: list[Edit] = lower(graph_of(), update_at_once)
    assert edits == []
