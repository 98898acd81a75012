"""What a quantizer costs on a GPU, counted in the code that Inductor generates for one that is not there."""

import pytest

from benchmarks.bytes import beyond

# Bytes for an element beyond float. Forward: the solve reads 2, and the kernel of codes and levels reads 2 and writes 1
# and 2. Backward: levels are written again (3), and masked: behind a relu by what replaces its value, else by the value
# computed again; where attention reads or wrote the gradient, four of ten elements in a transformer, in place, which
# reads 1 and touches 0.6. Where levels are kept, only these four have codes. Here, not in a deeper net, the norm that
# comes first passes no gradient on, and the mask behind it is a kernel of its own. Tokens of 8 bits: codes of two bytes
# are written where the clip is found (4) and read where levels are (4), beside a clip for 16 elements or more.
LIMITS = {
    ("convolutions", "codes"): (7.0, 1.0),
    ("transformer", "codes"): (7.0, 5.1),
    ("transformer", "levels"): (6.4, 2.1),
    ("transformer, w4a8-g32-token", "codes"): (8.25, 5.6),
}


@pytest.mark.compile
@pytest.mark.parametrize(("net", "keep"), LIMITS)
def test_bytes_and_launches(net: str, keep: str) -> None:
    found = beyond(net, 1, keep=keep)
    forward, backward = LIMITS[net, keep]
    assert found.forward <= forward
    assert found.backward <= backward
    # Three of a solve and one of codes and levels, which may join one that is there; all states are written in three.
    assert found.launches <= 4 + 3 / found.quantizers
