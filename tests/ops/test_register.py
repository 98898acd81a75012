import importlib.util
import subprocess
import sys

import pytest
import torch

from octav_fx.ops.register import has_triton, register_op

ran = []


def empty(x, factor):
    return torch.empty_like(x)


def reference(x, factor):
    ran.append("reference")
    return x * factor


def kernel(x, factor, out):
    if x.dtype is not torch.float32:
        return False
    ran.append("kernel")
    torch.mul(x, factor, out=out)
    return True


scale = register_op("test_define_scale", "Tensor x, int factor", empty=empty, reference=reference, cpu=kernel)
CASES = [(torch.float32, "kernel"), (torch.float64, "reference")]


@pytest.fixture(autouse=True)
def nothing_ran():
    ran.clear()


@pytest.mark.parametrize(("dtype", "expected"), CASES)
def test_the_reference_runs_where_the_kernel_declines(dtype, expected):
    x = torch.randn(5, dtype=dtype)
    assert torch.equal(scale(x, 3), 3 * x)
    assert ran == [expected]


@pytest.mark.parametrize(("dtype", "expected"), CASES)
def test_out_is_written(dtype, expected):
    x, out = torch.randn(3, 4, dtype=dtype), torch.zeros(4, 6, dtype=dtype).t()[::2]
    assert scale(x, 3, out=out) is None
    assert torch.equal(out, 3 * x)
    assert ran == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_lies_where_empty_put_it(dtype):
    x = torch.randn(3, 4, dtype=dtype).t()
    assert scale(x, 3).stride() == x.stride()


def test_arguments_have_names():
    assert scale(x=torch.ones(2), factor=3).tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tracing_asks_empty_alone(dtype):
    x = torch.empty(3, 4, dtype=dtype, device="meta").t()
    y = scale(x, 3)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    out = torch.empty(4, 3, dtype=dtype, device="meta")
    assert scale(x, 3, out=out) is None
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x = torch.randn(3, 4, dtype=dtype)
    torch.library.opcheck(scale.default, (x, 3))
    torch.library.opcheck(scale.out, (x, 3), {"out": torch.empty_like(x)})


@pytest.mark.parametrize("overload", ["default", "out"])
def test_both_overloads_take_any_layout(overload):
    assert torch.Tag.flexible_layout in getattr(scale, overload).tags


@pytest.mark.slow
def _halves(x, factor):
    return x * factor, x.sum(-1) / factor


halves = register_op(
    "test_define_halves",
    "Tensor x, int factor",
    empty=lambda x, factor: (torch.empty_like(x), x.new_empty(x.shape[:-1])),
    reference=_halves,
    outs=("out", "rest"),
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("op", [scale, halves], ids=["one result", "two"])
def test_vmap_calls_it_for_each_index(op, axis):
    x = torch.randn(3, 4, 5)
    found = torch.func.vmap(lambda x: op(x, 2), axis)(x)
    expected = [op(part, 2) for part in x.unbind(axis)]
    if op is scale:
        assert torch.equal(found, torch.stack(expected))
    else:
        assert all(map(torch.equal, found, map(torch.stack, zip(*expected, strict=True))))


def test_nothing_imports_triton_before_a_gpu_asks_for_a_kernel():
    code = "import sys, octav_fx.ops; sys.exit(any(name.endswith('.kernel') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_a_warning_says_so_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no Triton") as record:
            assert not has_triton()
            assert not has_triton()
        assert len(record) == 1
    finally:
        has_triton.cache_clear()
