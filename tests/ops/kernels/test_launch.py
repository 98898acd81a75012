"""launch: what Triton's own launch does, also where a kernel that was compiled for other arguments is known."""

import pytest
import torch

from octav_fx.ops.zero_clipped import reference
from tests.support.interpreter import DEVICE

launch = pytest.importorskip("octav_fx.ops.kernels.launch.kernel")
zero_clipped = pytest.importorskip("octav_fx.ops.zero_clipped.kernel")

pytestmark = pytest.mark.gpu


def zeroed(grad: torch.Tensor, codes: torch.Tensor, low: int) -> torch.Tensor:
    n, constants = grad.numel(), {"LOW": low, "HIGH": 7, "BLOCK": 128, "WIDE": False}
    launch.launch(zero_clipped.zero_clipped_kernel, -(-n // 128), grad, codes, n, constants=constants)
    return grad


# Of the ones before each differs in one thing that Triton compiles for: a number of 1, or divided by 16, an alignment,
# a dtype, a constant. The second time all are known.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [-8, 0])
@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("n", [1, 256, 333])
def test_arguments_get_what_was_compiled_for_them(n: int, begin: int, low: int, dtype: torch.dtype) -> None:
    for _ in range(2):
        grad = torch.randn(n + begin, device=DEVICE).to(dtype)[begin:]
        codes = torch.randint(-9, 9, (n + begin,), dtype=torch.int8, device=DEVICE)[begin:]
        expected = grad.clone()
        reference.zero_clipped_(expected, codes, low, 7)
        assert torch.equal(zeroed(grad, codes, low), expected)
