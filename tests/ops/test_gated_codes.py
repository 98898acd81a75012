"""gated_codes: codes times a gate for each channel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.ops.gated_codes import reference
from octav_fx.ops.gated_codes.op import gated_codes
from tests.support.strategies import filled_with_nan

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
# A gate of a half and steps that are a power of two apart make ties.
GATES = st.sampled_from([0.0, 0.5, 0.3, -1.7, float("inf"), float("nan")])


def operands(shape, gate: float = 0.5, grids=(8, True, 8, True)):
    x = torch.randint(0, 2 ** grids[0], shape, dtype=torch.uint8)
    gates = torch.full((*shape[:2], 1, 1), gate)
    gates[0] = torch.rand(shape[1], 1, 1)
    return x, torch.tensor(0.25), gates, torch.tensor(0.5), *grids


@settings(max_examples=100)
@given(shape=SHAPES, gate=GATES, bits=st.tuples(*[st.integers(2, 8)] * 2), signed=st.tuples(*[st.booleans()] * 2))
def test_the_kernel_is_the_definition(kernels, shape, gate, bits, signed):
    args = operands(shape, gate, (bits[0], signed[0], bits[1], signed[1]))
    with filled_with_nan():
        found = gated_codes(*args)
    assert torch.equal(found, reference.gated_codes(*args))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2])
def test_a_large_tensor(kernel_calls, threads, count):
    threads(count)
    args = operands((2, 33, 40, 41))
    assert torch.equal(gated_codes(*args), reference.gated_codes(*args))
    assert kernel_calls == ["octav_gated_codes"]


def test_opcheck():
    torch.library.opcheck(gated_codes.default, operands((2, 3, 4, 5)))
