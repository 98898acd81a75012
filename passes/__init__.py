"""Every rewrite, one file each, and the ordered lists of them. Installed as octav_fx.passes."""

if __name__ != "octav_fx.passes":
    raise ImportError("this folder is the package octav_fx.passes; import it under that name")

from typing import Any, Final

from octav_fx.passes.canonicalize import canonicalize
from octav_fx.passes.filters_channels_last import filters_channels_last
from octav_fx.passes.fold_batchnorm import fold_batchnorm
from octav_fx.passes.fold_factors import fold_factors
from octav_fx.passes.fold_statistics import fold_statistics
from octav_fx.passes.gather_weights import gather_weights
from octav_fx.passes.integer_matmul import integer_matmul
from octav_fx.passes.quantize_operands import Choose, Place, quantize_operands
from octav_fx.passes.save_codes import save_codes
from octav_fx.passes.share_quantizers import share_quantizers
from octav_fx.passes.split_attention import split_attention
from octav_fx.passes.static_quantizers import static_quantizers
from octav_fx.passes.store_codes import store_codes

# The order in which quantize() runs them.
PREPARE: Final[tuple[Any, ...]] = (
    canonicalize,  # one spelling for each op; everything below matches on it
    split_attention,  # before quantizing, if asked for: its matmuls are then operands like any
    fold_batchnorm,  # before quantizing, if asked for: the folded weight is the one to clip
    quantize_operands,  # one quantizer before each operand
    share_quantizers,  # last: one quantizer for each value, where several operands got equal ones
)

# What the backend runs on the joint graph of forward and backward. The partitioner comes next: it decides by size and
# by what can be recomputed what is kept between the two.
LOWER: Final[tuple[Any, ...]] = (
    save_codes,  # first: it splits the quantizers into the parts that the rest is about
    filters_channels_last,  # after save_codes, whose fake_quantize of a weight it replaces
    integer_matmul,  # after save_codes, whose codes it multiplies
    gather_weights,  # last: of the weights whose levels are still needed
)

# What convert() runs on the eval graph of a frozen model.
CONVERT: Final[tuple[Any, ...]] = (
    store_codes,  # first: it tells weights from activations by what their quantizers read
    static_quantizers,  # the quantizers that are left
    fold_statistics,  # any time: no code depends on it
)

# What export_onnx() runs on the converted model.
EXPORT: Final[tuple[Any, ...]] = (
    fold_factors,  # runtimes fuse a convolution with what follows only where nothing stands between them
)

__all__ = [
    "CONVERT",
    "EXPORT",
    "LOWER",
    "PREPARE",
    "Choose",
    "Place",
    "canonicalize",
    "filters_channels_last",
    "fold_batchnorm",
    "fold_factors",
    "fold_statistics",
    "gather_weights",
    "integer_matmul",
    "quantize_operands",
    "save_codes",
    "share_quantizers",
    "split_attention",
    "static_quantizers",
    "store_codes",
]
