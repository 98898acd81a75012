"""Quantizers that are there already: for the same operands further graphs have the same ones."""

from collections.abc import Mapping
from typing import Any

from octav_fx.capture.modules import QuantizedModule
from octav_fx.compat.modules import children_of
from octav_fx.formats.granularity import Granularity
from octav_fx.nn import FakeQuantizer
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import Place


def quantizers_by_operand(quantized: QuantizedModule) -> dict[tuple[str, str], FakeQuantizer]:
    """Return the quantizers of a module by site and operand."""
    rows = [row for mode in quantized.all_records.values() for row in mode if row.quantizer is not None]
    found: dict[tuple[str, str], Any] = {}
    for row in rows:
        found.setdefault((row.site, str(row.operand)), quantized.get_submodule(str(row.quantizer)))
    return found


def take_quantizers(
    graph: QuantizedModule, known: Mapping[tuple[str, str], FakeQuantizer]
) -> list[tuple[tuple[str, str], FakeQuantizer]]:
    """Give a graph those of the known quantizers that fit its operands; return its own that stay, with theirs."""
    held: Any = children_of(graph)[QUANTIZERS]
    placed, left = set(), []
    for operand, quantizer in quantizers_by_operand(graph).items():
        # One that several operands share goes by the first.
        if quantizer in placed:
            continue
        placed.add(quantizer)
        taken = known.get(operand)
        if taken is not None and _is_alike(taken, quantizer):
            name = next(name for name, module in held.named_children() if module is quantizer)
            held.add_module(name, taken)
            placed.add(taken)
        else:
            left.append((operand, quantizer))
    return left


def _is_alike(known: FakeQuantizer, quantizer: FakeQuantizer) -> bool:
    """Tell whether a quantizer can stand for another one: that of a parameter keeps no mean over batches."""
    is_same_kind = known.settings == quantizer.settings and known.running == quantizer.running
    return is_same_kind and known.hint.shape == quantizer.hint.shape


def fits(known: Granularity, chosen: Granularity, place: Place) -> bool:
    """Tell whether a granularity is one for an operand, in place of the one that was chosen for it."""
    if known.is_short:
        return known.axis == place.reduction and known.divides(place.shape)
    return known.axis == place.dim if known.kind == "channel" else chosen.kind != "channel"
