"""What a quantizer costs on a GPU, counted in the code that Inductor generates for one that is not there."""

import pytest

from benchmarks.bytes import NETS, beyond

# Bytes for an element beyond float. Forward: the solve reads 2, and the kernel of codes and levels reads 2 and writes 1
# and 2. Backward: levels are written again (3), and masked: behind a relu by what replaces its value, in a transformer
# in kernels of their own where attention reads or wrote the gradient (5, four of ten elements), else for 1.
LIMITS = {"convolutions": (7.0, 1.0), "transformer": (7.0, 5.6)}


@pytest.mark.compile
@pytest.mark.parametrize("net", NETS)
def test_bytes_and_launches(net: str) -> None:
    found = beyond(net, depth=1)
    forward, backward = LIMITS[net]
    assert found.forward <= forward
    assert found.backward <= backward
    # Three of a solve and one of codes and levels, which may join one that is there; all states are written in three.
    assert found.launches <= 4 + 3 / found.solves
