"""The modules that quantized and converted models are made of."""

from octav_fx.nn.fake_quantizer import FakeQuantizer, Spec, as_autocast
from octav_fx.nn.static import ChannelAffine, IntegerBias, IntegerWeight, StaticQuantizer

__all__ = ["ChannelAffine", "FakeQuantizer", "IntegerBias", "IntegerWeight", "Spec", "StaticQuantizer", "as_autocast"]
