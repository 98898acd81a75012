"""Store the integer codes of a quantized weight in place of the weight.

    conv2d(x, quantizers.conv_weight(conv.weight), b)       ->  conv2d(x, quantizers.conv_weight(), b)
    matmul(x, quantizers.matmul_other(transpose(w, 0, 1)))  ->  matmul(x, quantizers.matmul_other())

for a weight that the module's state alone decides: quantizers.conv_weight becomes an IntegerWeight, with the codes that
the frozen quantizer gives now; a StoredWeight where it has groups or another format than integers, which no integer
layer multiplies yet. The float parameter goes where nothing else reads it.
"""

from torch import fx, nn

from octav_fx.errors import OctavError
from octav_fx.ir.arguments import module_input
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.edits import Edit, erase_with_sources
from octav_fx.ir.ops import module_of
from octav_fx.nn import FakeQuantizer, IntegerWeight, StoredWeight


def pack_weights(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. Raises OctavError for a weight with inf or NaN in it."""
    edits = []
    known = constants(gm.graph)
    for node in gm.graph.find_nodes(op="call_module"):
        quantizer = module_of(node)
        if not isinstance(quantizer, FakeQuantizer) or quantizer.clip is None:
            continue
        source, spec = module_input(node), quantizer.spec
        if source not in known:
            continue
        weight = value_of(gm, source)
        if not weight.isfinite().all():
            raise OctavError(f"{node.target}: the weight {source} holds inf or NaN, which no integer stands for")
        if spec.even is None:
            stored: nn.Module = StoredWeight(weight, quantizer.clip, spec)
        else:
            grid, dim = spec.even
            stored = IntegerWeight(weight, quantizer.clip, grid.bits, dim, grid.narrow)
        gm.set_submodule(str(node.target), stored, strict=True)
        node.args = ()
        erase_with_sources(source)
        edits.append(Edit(str(node.target), "store", spec.format.label))
    return edits
