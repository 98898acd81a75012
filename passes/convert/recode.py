"""Go from the codes of one quantizer to those of a narrower one that reads its levels.

integer_codes(levels(codes, s1, bits1, signed1), s2, bits2, signed2)
->  recode(codes, s1, s2, bits1, signed1, bits2, signed2)
"""

from torch import fx

from octav_fx.ir.arguments import bound_arguments
from octav_fx.ir.edits import Edit
from octav_fx.nn.integer import integer_codes
from octav_fx.nn.integer import recode as recoded
from octav_fx.passes.convert.on_codes import is_levels, on_codes


def recode(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        read = bound_arguments(node)
        source = read["x"]
        if not is_levels(source):
            continue
        x = on_codes(source)
        grids = (x.bits, x.signed, read["bits"], read["signed"])
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(recoded, (x.codes, x.scale, read["scale"], *grids))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if not source.users:
            gm.graph.erase_node(source)
        edits.append(Edit(node.name, "recode", f"{x.bits} bits to {read['bits']}"))
    return edits
