"""Graph: an ONNX graph while a target rewrites it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from octav_fx.deploy.runtimes import optional
from octav_fx.formats.packing import pack


class Graph:
    """The graph of an onnx.ModelProto: who makes and who reads each value, and what a node is replaced by.

    rewrite() goes over the nodes in their order; what it makes lies where the node was. parts: what the nodes of octav
    stand for, by their keys; who makes such a node adds its part.
    """

    def __init__(self, model: Any, parts: Mapping[str, Any]) -> None:
        self.onnx = optional("onnx")
        self.model, self.proto, self.parts = model, model.graph, dict(parts)
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}
        self._index(self.proto.node)

    def _index(self, nodes: Sequence[Any]) -> None:
        self.makers = {output: node for node in nodes for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def rewrite(self, replace: Callable[[Any], list[Any] | None]) -> None:
        """Put what replace returns in the place of each node; None leaves the node."""
        nodes = []
        for node in list(self.proto.node):
            made = replace(node)
            nodes += [node] if made is None else made
        nodes = self._used(nodes)
        # The list owns its nodes, and lets go of them when it is emptied.
        copies = [self.onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.proto.node[:]
        self.proto.node.extend(copies)
        self._index(self.proto.node)

    def finish(self) -> Any:
        """Return the model, with the constants that are read."""
        graphs = [self.proto, *(part for part in described(self.proto) if hasattr(part, "node"))]
        read = {name for inner in graphs for node in inner.node for name in node.input}
        read |= {value.name for value in self.proto.output}
        del self.proto.initializer[:]
        self.proto.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        return self.model

    def _used(self, nodes: list[Any]) -> list[Any]:
        """Return the nodes that an output is computed from."""
        needed = {value.name for value in self.proto.output}
        kept = []
        for node in reversed(nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
                # What the graphs inside of it read.
                needed |= {
                    name for part in described_of(node) if hasattr(part, "node") for n in part.node for name in n.input
                }
        return kept[::-1]

    def node(self, kind: str, inputs: Sequence[str], output: str, name: str | None = None, **attributes: Any) -> Any:
        """Return a node; its name is that of its output unless given."""
        return self.onnx.helper.make_node(kind, list(inputs), [output], name or output, **attributes)

    def constant(self, name: str, kind: str, value: Tensor) -> str:
        """Add an initializer of a type of TensorProto ("UINT8", "INT4", ...), once, and return its name."""
        value = value.detach().cpu()
        if kind == "INT4":
            data = pack(value).contiguous().numpy().tobytes()
        else:
            data = value.to(_DTYPES[kind]).contiguous().numpy().tobytes()
        number = getattr(self.onnx.TensorProto, kind)
        self.constants[name] = self.onnx.helper.make_tensor(name, number, list(value.shape), data, raw=True)
        return name

    def domain(self, name: str) -> str:
        """Let nodes be of a domain beside ONNX's own, in its first version, and return its name."""
        if all(entry.domain != name for entry in self.model.opset_import):
            self.model.opset_import.append(self.onnx.helper.make_opsetid(name, 1))
        return name

    def value(self, name: str) -> Tensor | None:
        """Return the value of an initializer; None for any other name."""
        tensor = self.constants.get(name)
        return None if tensor is None else torch.from_numpy(self.onnx.numpy_helper.to_array(tensor).copy())

    def shape(self, name: str) -> list[int | None] | None:
        """Return the sizes of a value, None for a free one; None for a value without a known rank."""
        for value in (*self.proto.value_info, *self.proto.input, *self.proto.output):
            if value.name == name and value.type.tensor_type.HasField("shape"):
                return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        return None


_DTYPES = {"FLOAT": torch.float32, "INT8": torch.int8, "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64}


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """Return the value of an attribute of a node."""
    from_proto = optional("onnx").helper.get_attribute_value
    return next((from_proto(entry) for entry in node.attribute if entry.name == name), default)


def described(graph: Any) -> Iterator[Any]:
    """Yield everything in a graph, and in the graphs inside of its nodes, that has a doc_string of its own."""
    yield from graph.initializer
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        yield node
        yield from described_of(node)


def described_of(node: Any) -> Iterator[Any]:
    """Yield the graphs inside of a node and everything in them."""
    for entry in node.attribute:
        for inner in (*entry.graphs, *([entry.g] if entry.HasField("g") else [])):
            yield inner
            yield from described(inner)
