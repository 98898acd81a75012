"""The modules that quantized and converted models are made of."""

from octav_fx.nn.fake_quantizer import FakeQuantizer, Settings, as_autocast
from octav_fx.nn.static import ChannelAffine, IntegerBias, IntegerWeight, StaticQuantizer, StoredWeight

__all__ = [
    "ChannelAffine",
    "FakeQuantizer",
    "IntegerBias",
    "IntegerWeight",
    "Settings",
    "StaticQuantizer",
    "StoredWeight",
    "as_autocast",
]
