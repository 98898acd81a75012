import math

import pytest
import torch

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip import reference
from octav_fx.ops.register import REGISTERED
from tests.support.interpreter import DEVICE

kernel = pytest.importorskip("octav_fx.ops.optimal_clip.kernel")

pytestmark = pytest.mark.gpu


@pytest.fixture
def solves(monkeypatch):
    """The names of the solves that run, in order."""
    ran = []

    def recorded(name, solve):
        def run(*args, **kwargs):
            ran.append(name)
            return solve(*args, **kwargs)

        return run

    for name in ("solve_rows", "solve_passes", "solve_tail"):
        monkeypatch.setattr(kernel, name, recorded(name, getattr(kernel, name)))
    return ran


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("method", "shape", "dim", "dtype", "expected"),
    [
        ("octav", (3, 40), None, torch.float32, ["solve_rows"]),
        ("octav", (3, 400), 0, torch.float32, ["solve_rows"]),
        ("octav", (3, 400), None, torch.bfloat16, ["solve_tail"]),
        ("octav-grid", (3, 400), None, torch.float16, ["solve_passes"]),
        ("octav-tight", (3, 400), None, torch.bfloat16, ["solve_tail"]),
        ("octav-tight", (3, 400), 0, torch.float32, ["solve_rows"]),
        ("max", (3, 400), None, torch.float32, ["solve_passes"]),
        ("max", (3, 40), -1, torch.float32, ["solve_rows"]),
    ],
)
def test_each_tensor_gets_its_solve(monkeypatch, solves, method, shape, dim, dtype, expected, bits):
    monkeypatch.setattr(kernel, "TAIL_FROM", dict.fromkeys(range(1, 5), 1000))
    x = torch.randn(shape, device=DEVICE).to(dtype)
    hint = torch.full(clip_shape(x, dim), 2.0, device=DEVICE)
    out = torch.full_like(hint, math.nan)
    assert kernel.optimal_clip(x, hint, integers(bits, True, dim), method, out=out, one_program=1000)
    assert solves == expected
    torch.testing.assert_close(
        out, reference.optimal_clip(x, hint, integers(bits, True, dim), method), rtol=1e-6, atol=0
    )


def test_what_the_tail_declines_goes_to_the_passes(monkeypatch, solves):
    monkeypatch.setattr(kernel, "solve_tail", lambda *args, **kwargs: False)
    monkeypatch.setattr(kernel, "TAIL_FROM", {4: 10})
    x, hint, out = torch.randn(100, device=DEVICE), torch.tensor(2.0, device=DEVICE), torch.empty((), device=DEVICE)
    assert kernel.optimal_clip(x, hint, integers(4, True, None), "octav", out=out, one_program=10)
    assert solves == ["solve_passes"]


def test_what_no_kernel_knows_is_left_to_the_reference():
    x, hint, out = torch.randn(100, device=DEVICE), torch.tensor(2.0, device=DEVICE), torch.empty((), device=DEVICE)
    for one_program in (10, 1000):
        assert not kernel.optimal_clip(x, hint, integers(4, True, None), "other", out=out, one_program=one_program)
        assert not kernel.optimal_clip(
            x.double(), hint, integers(4, True, None), "octav", out=out, one_program=one_program
        )


@pytest.mark.parametrize("name", ["optimal_clip", "quantize", "dequantize", "fake_quantize", "fake_quantize_backward"])
@pytest.mark.parametrize("overload", ["", ".out"])
def test_the_ops_are_registered_for_gpus(name, overload):
    assert name in REGISTERED
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"octav::{name}{overload}", "CUDA")
