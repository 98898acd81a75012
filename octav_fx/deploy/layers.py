"""The linear layers of a frozen model, as files of weights store them: each a module's name, codes, and a scale."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.modules import QuantizedModule, quantized_modules
from octav_fx.deploy.freeze import check_frozen
from octav_fx.errors import OctavError
from octav_fx.ir.arguments import argument, module_input
from octav_fx.ir.movement import quantizer_before
from octav_fx.ir.ops import is_op, module_of
from octav_fx.ir.records import graph_info
from octav_fx.nn import FakeQuantizer, StoredWeight


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer whose weight is quantized.

    name: of its module in the model. weight: codes [out, in] and their scale. input: what rounds the activation; None
    where it stays float.
    """

    name: str
    weight: StoredWeight
    input: FakeQuantizer | None


def linear_layers(q: nn.Module) -> list[LinearLayer]:
    """Return the linear layers of a frozen model whose weights are quantized, in the order of its graphs.

    Raises OctavError for a model that is not frozen or has no such layer, and for whatever else of it is rounded:
    a file of the weights of linear layers would compute without that.
    """
    found = dict[str, LinearLayer]()
    paths = {module: name for name, module in q.named_modules()}
    for module in quantized_modules(q):
        check_frozen(module)
        for guarded in module.graphs_of(False):
            for layer in _layers_of(module, paths[module.owner], guarded.graph, found):
                _add(found, layer)
    if not found:
        raise OctavError("no weight of a linear layer is quantized: there is nothing that such a file stores")
    return list(found.values())


def float_state(q: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of a quantized model without what belongs to quantizers: the keys of the float model."""
    own = tuple(f"{name}." for name, module in q.named_modules() if isinstance(module, FakeQuantizer))
    return {key: value for key, value in q.state_dict().items() if not key.startswith(own)}


def scales_in(dtype: torch.dtype, name: str, scale: Tensor) -> Tensor:
    """Return the scales of a layer in a dtype. Raises OctavError where that does not hold them."""
    stored = scale.to(dtype).contiguous()
    if not torch.equal(stored.to(scale.dtype), scale):
        raise OctavError(
            f"{name}: {dtype} does not hold its scales, and codes are for scales as they are stored: quantize with "
            f"overrides={{{name!r}: {{'scale_format': {str(dtype).removeprefix('torch.')!r}}}}}, or with that "
            "scale_format for all"
        )
    return stored


def _layers_of(
    module: QuantizedModule, path: str, graph: fx.Graph, found: Mapping[str, LinearLayer]
) -> list[LinearLayer]:
    """Return the layers that a graph of a module calls, and raise for whatever else it rounds.

    path: of the module. found: those of other graphs, whose codes are the same.
    """
    layers, said = list[LinearLayer](), set[fx.Node]()
    for node in graph.nodes:
        if not is_op(node, "linear"):
            continue
        weight, rounded = (quantizer_before(argument(node, name), node) for name in ("weight", "input"))
        source = None if weight is None else module_input(weight)
        if weight is not argument(node, "weight") or source is None or source.op != "get_attr":
            continue
        key = f"{path}.{source.target}".lstrip(".")
        name, _, last = key.rpartition(".")
        if last != "weight":
            continue
        quantizer, activation = module_of(weight), None if rounded is None else module_of(rounded)
        assert isinstance(quantizer, FakeQuantizer) and quantizer.clip is not None
        assert activation is None or isinstance(activation, FakeQuantizer)
        value = module.get_parameter(str(source.target))
        if not value.isfinite().all():
            raise OctavError(f"{key} holds inf or NaN, which no code stands for")
        known = found.get(name)
        stored = StoredWeight(value, quantizer.clip, quantizer.spec) if known is None else known.weight
        layers.append(LinearLayer(name, stored, activation))
        said |= {weight, *([] if rounded is None else [rounded])}
    for node in graph.find_nodes(op="call_module"):
        if isinstance(module_of(node), FakeQuantizer) and node not in said:
            raise OctavError(
                f"{_site(module, str(node.target))} is quantized, and a file of the weights of linear layers cannot "
                "say so: it would compute otherwise than the model that was trained. quantize it with "
                "overrides={name: None} for what is no linear layer"
            )
    return layers


def _add(found: dict[str, LinearLayer], layer: LinearLayer) -> None:
    """Add a layer. Raises OctavError for one that another call of it, or another kind of calls, rounds otherwise."""
    known = found.setdefault(layer.name, layer)
    inputs = [None if each.input is None else (each.input.spec, each.input.clip) for each in (known, layer)]
    if known.input is not layer.input and not _are_equal(*inputs):
        raise OctavError(
            f"{layer.name} is called several times, with other clips of its input, and a file has one for each layer: "
            "quantize it with activation_bits=None or a clip for each token"
        )


def _are_equal(one: tuple[object, Tensor | None] | None, other: tuple[object, Tensor | None] | None) -> bool:
    if one is None or other is None or one[0] != other[0]:
        return one is other
    return one[1] is None or other[1] is None or bool((one[1] == other[1]).all())


def _site(module: QuantizedModule, quantizer: str) -> str:
    """Return the name of the node and the operand that a quantizer stands before."""
    named = (f"{r.site} {r.operand}" for r in module.records if r.quantizer == quantizer)
    return next(named, f"{graph_info(module).path}.{quantizer}".lstrip("."))
