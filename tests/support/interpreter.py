"""Triton's interpreter, which runs the kernels' own source on CPU tensors; made to round where it would cut.

TRITON_INTERPRET=1 has to be set before triton is imported for the first time: tests/conftest.py does that on machines
without a GPU. With one the same tests run the compiled kernels.
"""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cast(self, source, target):
    """As on a GPU: to bfloat16 with ties to even, from bfloat16 with its subnormal numbers (triton 3.7 has neither)."""
    from triton.runtime.interpreter import TensorHandle

    kinds = (source.dtype.scalar, target.scalar)
    bits = source.data
    if kinds == (triton.language.float32, triton.language.bfloat16):
        cut = torch.from_numpy(np.array(bits, dtype=np.float32)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(cut.view(np.uint16), target.scalar)
    if kinds == (triton.language.bfloat16, triton.language.float32):
        wide = np.asarray(bits).view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(wide.view(np.float32), target.scalar)
    return _their_cast(self, source, target)


if DEVICE == "cpu":
    from triton.runtime.interpreter import InterpreterBuilder

    _their_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, _cast


def small_block(x: torch.Tensor) -> int:
    """A block with which x takes several programs, and not too many: each takes the interpreter milliseconds."""
    # Every other block is another kernel to compile.
    return 256 if DEVICE == "cuda" else max(16, triton.next_power_of_2(x.numel() // 6 + 1))


def poisoned(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Where a result for x goes, full of NaN or of no code: an element that is never written shows."""
    out = torch.empty_like(x, dtype=dtype)
    return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
