"""optimal_clip on a GPU: which of the solves runs. See reference.py; the sums run in another order than there."""

from typing import Final

from torch import Tensor

from octav_fx.ops.solve_passes.kernel import solve_passes
from octav_fx.ops.solve_rows.kernel import LONGEST, solve_rows

# Up to here one program, which holds the tensor, is a single launch and reads it once.
ONE_PROGRAM: Final = LONGEST


def optimal_clip(
    x: Tensor,
    hint: Tensor,
    bits: int,
    signed: bool,
    dim: int | None,
    method: str,
    *,
    out: Tensor,
    one_program: int = ONE_PROGRAM,
) -> bool:
    """Write the clips into out [] or [C]; False where only the reference will do."""
    if dim is not None or x.numel() <= one_program:
        return solve_rows(x, hint, bits, signed, dim, method, out=out)
    return solve_passes(x, hint, bits, signed, method, out=out)
