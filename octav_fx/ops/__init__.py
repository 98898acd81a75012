"""torch.ops.octav.*: importing this package registers the ops. One folder per op.

reference.py is the definition in pure torch, kernel.cpp the CPU passes, kernel.py those in Triton, op.py the schema,
shapes and gradient.
"""

from octav_fx.ops.deployed import ChannelAffine, IntegerWeight, StaticQuantizer
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from octav_fx.ops.fake_quantize_filters.op import fake_quantize_filters, fake_quantize_filters_backward
from octav_fx.ops.fake_quantize_weights.op import fake_quantize_weights
from octav_fx.ops.fake_quantizer import FakeQuantizer, Spec
from octav_fx.ops.int_matmul.op import int_matmul
from octav_fx.ops.learned_fake_quantize.op import (
    learned_fake_quantize,
    learned_fake_quantize_backward,
    learned_parameter_backward,
)
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.ops.quantize.op import quantize
from octav_fx.ops.synced_clip.op import synced_clip

__all__ = [
    "ChannelAffine",
    "FakeQuantizer",
    "IntegerWeight",
    "Spec",
    "StaticQuantizer",
    "dequantize",
    "dynamic_fake_quantize",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_filters",
    "fake_quantize_filters_backward",
    "fake_quantize_weights",
    "int_matmul",
    "learned_fake_quantize",
    "learned_fake_quantize_backward",
    "learned_parameter_backward",
    "optimal_clip",
    "quantize",
    "synced_clip",
]
