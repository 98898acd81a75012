"""Modules whose forward runs one of their graphs, if it holds for the call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from octav_fx.capture.guards import GuardedGraph
from octav_fx.compat.graphs import forward_from
from octav_fx.errors import OctavError


class GuardedModule(fx.GraphModule):
    """A GraphModule that asks the guards of its graphs before it runs one.

    The generated forward has the parameters of the present graph and leaves to `_dispatch` which graph to run.
    """

    def _captured(self) -> Sequence[GuardedGraph]:
        """Return every graph that the module may run."""
        raise NotImplementedError

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that holds for a call: its values are in the order of the parameters."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> Any:
        # What torch.jit.script asks a module for before it reads its source.
        raise OctavError(
            f"torch.jit.script reads source code, and {type(self).__name__} runs graphs: torch.jit.trace, "
            "torch.export.export and octav_fx.export_onnx write them down"
        )

    def recompile(self) -> Any:
        """Generate the code of the present graph anew, and a forward that runs it where it holds."""
        code = super().recompile()
        kind: Any = type(self)
        for guarded in self._captured():
            if guarded.graph is self.graph:
                guarded.set_function(kind.forward)
                kind.forward = self._forward_of(code.globals)
                break
        return code

    def _forward_of(self, names: dict[str, Any]) -> Callable[..., Any]:
        head = next(line for line in self.code.splitlines() if line.startswith("def forward("))
        inputs = ", ".join(str(node.target) for node in self.graph.find_nodes(op="placeholder"))
        known: dict[str, Callable[..., Any]] = self.__dict__.setdefault("_forwards", {})
        # The same object each time: compilers ask for it.
        if head not in known:
            known[head] = forward_from(f"{head}\n    return self._dispatch({inputs})\n", names)
        return known[head]


def is_traced(args: Sequence[Any]) -> bool:
    """Tell whether a tracer asks, which has no values that guards could ask for."""
    return any(isinstance(arg, fx.Proxy) for arg in args)
