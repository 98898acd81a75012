"""Launches of Triton kernels with little Python: a step of a network has hundreds, and the GPU must not wait for them.

Triton's own launch finds out in every call which compiled kernel the arguments ask for: 50 to 100 us where there are
many. Here that is remembered by what it goes by.
"""

from typing import Any, Final

import torch
import triton
from torch import Tensor

# A compiled kernel, and its constants as it takes them, by kernel, device, constants, options and what arguments are.
_COMPILED: Final[dict[Any, tuple[Any, list[Any]]]] = {}


def launch(kernel: Any, programs: int, *args: Any, constants: dict[str, Any], **options: Any) -> None:
    """Run kernel[(programs,)](*args, **constants, **options), the first of which is a tensor.

    args: what comes before the constants. constants: numbers by the names of all arguments that the kernel has besides.
    """
    # Interpreted on a CPU nothing is compiled.
    if not (args[0].is_cuda and isinstance(kernel, triton.JITFunction)):
        kernel[(programs,)](*args, **constants, **options)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, *constants.values(), *options.values(), *map(_asked, args))
    if key in _COMPILED:
        compiled, rest = _COMPILED[key]
        compiled[programs, 1, 1](*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    _COMPILED[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]


def _asked(value: Any) -> Any:
    """Return by what Triton chooses: dtype and alignment of a tensor, size and divisors of an integer."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)
