"""optimal_clip on a GPU: which of the solves runs. See reference.py; the sums run in another order than there."""

from typing import Final

from torch import Tensor

from octav_fx.clips.newton import as_octav
from octav_fx.formats.spec import spec_of
from octav_fx.ops.kernels.search_rows.kernel import search_rows
from octav_fx.ops.kernels.solve_passes.kernel import solve_passes
from octav_fx.ops.kernels.solve_rows.kernel import LONGEST, solve_rows
from octav_fx.ops.kernels.solve_tail.kernel import solve_tail

# Up to here one program, which holds the tensor, is a single launch and reads it once.
ONE_PROGRAM: Final = LONGEST
# From how many elements on, by bits, the paper's clip comes from the tail's histogram; below, from Newton's passes.
# By count of bytes and launches, not measured: the histogram reads 2 bytes an element, once, in 2 launches, and pays an
# atomic for each element of the tail (a tenth of the tensor at 4 bits, a fiftieth at 8); passes read the tensor six
# times near a good hint, in 26 launches, most of which exit at once. So the histogram wins everywhere but for uniform
# data at 2 bits, where both come out alike. To be replaced by measurements. 1 bit: "octav-tight" at 2.
TAIL_FROM: Final = dict.fromkeys(range(1, 9), ONE_PROGRAM)


def optimal_clip(
    x: Tensor,
    hint: Tensor,
    spec: str,
    method: str,
    *,
    out: Tensor,
    one_program: int = ONE_PROGRAM,
) -> bool:
    """Write the clips into out [] or [C]; False where only the reference will do."""
    # The solves know the lowest code as minus the steps.
    if (plain := spec_of(spec).plain) is None or plain[0].narrow:
        return search_rows(x, spec_of(spec), method, out=out)
    (grid, dim), signed = plain, plain[0].signed
    bits, method = as_octav(grid.bits, method)
    if dim is not None or x.numel() <= one_program:
        return solve_rows(x, hint, bits, signed, dim, method, out=out)
    by_tail = method == "octav" and x.numel() > TAIL_FROM[bits]
    return (by_tail and solve_tail(x, hint, bits, signed, out=out)) or solve_passes(
        x, hint, bits, signed, method, out=out
    )
