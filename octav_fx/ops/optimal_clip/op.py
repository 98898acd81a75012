"""torch.ops.octav.optimal_clip: the clip of a tensor, or of each of its channels."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octav_fx.clips.methods import searches
from octav_fx.clips.newton import as_octav
from octav_fx.clips.percentile import ONE_IN
from octav_fx.clips.search import COARSE, candidates
from octav_fx.formats.format import Format
from octav_fx.formats.granularity import Granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.scales import SCALES, scale_for
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops import cpu
from octav_fx.ops.levels import SCALE_CODES, floats, levels_of
from octav_fx.ops.optimal_clip import reference
from octav_fx.ops.register import register_op

# Their order is the kernel's.
_NEWTON = ("octav", "octav-grid")


def _empty(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    return x.new_empty(spec_of(spec).clip_shape(x.shape), dtype=torch.float32)


def _cpu(x: Tensor, hint: Tensor, spec: str, method: str, out: Tensor) -> bool:
    represented, library = spec_of(spec), cpu.library()
    fits = out.shape == represented.clip_shape(x.shape) and out.dtype is torch.float32
    if library is None or not fits or not out.is_contiguous() or (types := cpu.types_of("optimal_clip", x)) is None:
        return False
    rows = _rows(x, represented.granularity)
    passes = Passes(library, rows, *types)
    if not rows.numel():
        return False
    if searches(represented, method):
        clips = passes.search(represented)
    else:
        is_short = represented.granularity.is_short
        known = out.new_zeros(len(rows)) if is_short else cpu.checked(hint, out.shape)
        clips = passes.solve(known, represented.format, method)
        if clips is not None and represented.scale != "float32":
            stored, steps = SCALES[represented.scale], represented.format.steps
            clips = stored(clips / steps, passes.unit(represented)) * steps
    if clips is None:
        return False
    out.copy_(represented.granularity.of_rows(clips.clamp(max=torch.finfo(torch.float32).max), x.shape))
    return True


def _rows(x: Tensor, shared: Granularity) -> Tensor:
    """Return the rows of x that have a clip each, contiguous: [R, N]."""
    # The order of the elements does not matter to these: a dense tensor is one row, as it lies in memory.
    if shared.axis is None and cpu.is_dense(x):
        return x.as_strided((1, x.numel()), (x.numel(), 1))
    return shared.rows(x).contiguous()


class Rounding(ctypes.Structure):
    """The struct of rounding.h."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("code_bytes", ctypes.c_int),
        ("out_type", ctypes.c_int),
        ("ceiling", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes over rows [R, N] of an element type of theirs; each returns clips [R], or None if it cannot."""

    library: ctypes.CDLL
    rows: Tensor
    element: int

    def search(self, spec: Spec, rounding: Rounding | None = None) -> Tensor | None:
        """Search for the least error; with a rounding, round each row when its clip is found."""
        if (levels := levels_of(spec.format)) is None:
            return None
        clips, shares = self._clips(), _shares(spec.format, spec.scale, self.rows.shape[-1])
        tried = (shares, len(shares), spec.scale in COARSE)
        then = (None if rounding is None else ctypes.byref(rounding), torch.get_num_threads())
        self.library.octav_search(*self._data(clips), ctypes.byref(levels), *self._scale(spec), *tried, *then)
        return clips

    def round_unclipped(self, spec: Spec, rounding: Rounding) -> Tensor | None:
        """Find the largest magnitude of each row, and round it."""
        if (levels := levels_of(spec.format)) is None:
            return None
        clips, then = self._clips(), (ctypes.byref(rounding), torch.get_num_threads())
        self.library.octav_round_unclipped(*self._data(clips), ctypes.byref(levels), *self._scale(spec), *then)
        return clips

    def solve(self, hint: Tensor, form: Format, method: str) -> Tensor | None:
        """Find what Newton's steps, a percentile or a sweep give."""
        clips, threads = self._clips(), torch.get_num_threads()
        data = self._data(hint, clips)
        if method == "max" or method in ONE_IN:
            # "max": no value lies beyond.
            self.library.octav_percentile(*data, form.signed, ONE_IN.get(method, 0), threads)
        # The solves know the lowest code as minus the steps.
        elif not isinstance(form, Grid) or form.narrow:
            return None
        elif method == "mse":
            self.library.octav_sweep(*data, form.bits, form.signed, threads)
        else:
            bits, method = as_octav(form.bits, method)
            self.library.octav_optimal_clip(*data, bits, form.signed, _NEWTON.index(method), threads)
        return clips

    def unit(self, spec: Spec) -> Tensor:
        """Return the float32 scale of the tensor; 1 where scales have none above them."""
        if spec.scale != "e4m3":
            return torch.ones(())
        whole, none = Passes(self.library, self.rows.reshape(1, -1), self.element), torch.zeros(1)
        largest = whole.solve(none, Grid(8, True), "max")
        assert largest is not None
        return scale_for(largest.squeeze(0), spec.format)

    def _scale(self, spec: Spec) -> tuple[int, float]:
        return SCALE_CODES[spec.scale], float(self.unit(spec)) if spec.scale == "e4m3" else 1.0

    def _clips(self) -> Tensor:
        return self.rows.new_empty(len(self.rows), dtype=torch.float32)

    def _data(self, *tensors: Tensor) -> tuple[int, ...]:
        return (self.rows.data_ptr(), self.element, *self.rows.shape, *(tensor.data_ptr() for tensor in tensors))


@functools.cache
def _shares(form: Format, scale: str, n: int) -> ctypes.Array[ctypes.c_float]:
    return floats(candidates(form, scale, n))


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.optimal_clip import kernel

    return kernel.optimal_clip(*args, out=out)


optimal_clip = register_op(
    "optimal_clip",
    "Tensor x, Tensor hint, str spec, str method",
    empty=_empty,
    reference=reference.optimal_clip,
    cpu=_cpu,
    cuda=_cuda,
)
