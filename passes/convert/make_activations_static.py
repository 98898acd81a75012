"""Replace the quantizer of an activation by rounding with its static scale.

    quantizers.fc_input(x)  ->  quantizers.fc_input(x)      a StaticQuantizer, scale = clip / steps

The name and the call stay; the quantizer must be frozen.
"""

from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import module_of
from octav_fx.nn import FakeQuantizer, StaticQuantizer


def make_activations_static(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in gm.graph.find_nodes(op="call_module"):
        quantizer = module_of(node)
        if isinstance(quantizer, FakeQuantizer) and quantizer.clip is not None:
            if (plain := quantizer.spec.even) is None:
                # No integer kernel knows its levels: the frozen quantizer is its own definition.
                edits.append(Edit.unsupported(node, f"{quantizer.spec} is rounded by its definition"))
                continue
            grid, dim = plain
            gm.set_submodule(
                str(node.target), StaticQuantizer(quantizer.clip, grid.bits, grid.signed, dim), strict=True
            )
            edits.append(Edit(str(node.target), "static", grid.label))
    return edits
