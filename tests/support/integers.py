"""Codes, scales and clamps for the ops that multiply integers."""

import pytest
import torch
from hypothesis import strategies as st

from octav_fx.compat.tensors import multiplies_unsigned_bytes
from octav_fx.ops import onednn

needs_onednn = pytest.mark.skipif(onednn.largest_product() is None, reason="no integer kernels in this torch")
needs_vnni = pytest.mark.skipif(
    onednn.largest_product() != 255 * 128, reason="products of 8-bit codes saturate here, and such layers stay float"
)
needs_unsigned_bytes = pytest.mark.skipif(
    not multiplies_unsigned_bytes(), reason="this torch multiplies no unsigned bytes, and such a layer stays float"
)


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


@st.composite
def ends(draw: st.DrawFn) -> tuple:
    """The arguments after groups: a clamp or none, codes or floats."""
    low, high = draw(st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 0.5)]))
    step = draw(st.sampled_from([None, 0.01, 0.37, 5.0, 2.0**126]))
    step = None if step is None else torch.tensor(step)
    return low, high, step, draw(st.integers(2, 8)), draw(st.booleans())
