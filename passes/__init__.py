"""Every rewrite, one file each, and the ordered lists of them. Installed as octav_fx.passes."""

if __name__ != "octav_fx.passes":
    raise ImportError("this folder is the package octav_fx.passes; import it under that name")

from typing import Any, Final

from octav_fx.passes.canonicalize import canonicalize
from octav_fx.passes.fold_batchnorm import fold_batchnorm
from octav_fx.passes.quantize_operands import Choose, Place, quantize_operands
from octav_fx.passes.share_quantizers import share_quantizers

# The order in which quantize() runs them.
PREPARE: Final[tuple[Any, ...]] = (
    canonicalize,  # one spelling for each op; everything below matches on it
    fold_batchnorm,  # before quantizing, if asked for: the folded weight is the one to clip
    quantize_operands,  # one quantizer before each operand
    share_quantizers,  # last: one quantizer for each value, where several operands got equal ones
)

__all__ = [
    "PREPARE",
    "Choose",
    "Place",
    "canonicalize",
    "fold_batchnorm",
    "quantize_operands",
    "share_quantizers",
]
