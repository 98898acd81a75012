"""Values: what the nodes of a trace compute for the example inputs, on fake tensors."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from octav_fx.capture.module_state import with_tags_of
from octav_fx.capture.symbolic.guards import guard_equal
from octav_fx.capture.symbolic.patches import plain_settings
from octav_fx.capture.symbolic.proxies import UNKNOWN, TrainingFlag
from octav_fx.capture.symbolic.remembered import Call
from octav_fx.capture.symbolic.stand_ins import STAND_INS, Evaluation
from octav_fx.compat.graphs import ENTER_AUTOCAST, EXIT_AUTOCAST
from octav_fx.compat.tensors import (
    NEEDS_DATA,
    FakeTensorMode,
    is_dense,
    make_fake_of,
    pytree,
    storage_id,
    without_mode,
)
from octav_fx.ir.meta import fake

# A check holds by construction, and regions have been entered by the code that is traced.
_NOT_EVALUATED: Final = (guard_equal, ENTER_AUTOCAST, EXIT_AUTOCAST)


@dataclass(eq=False)
class Values:
    """The modules that are traced, example values of the arguments, and fake tensors for what the graph reads."""

    root: nn.Module
    # By argument name.
    arguments: Mapping[str, Any]
    fake_mode: FakeTensorMode
    # The mode that sees what forward does with tensors of modules.
    outer_mode: TorchFunctionMode
    # What holds tensors of modules, by name: forward may set it to something else before a node is made that reads it.
    first_values: Mapping[str, Any]
    # Modules that were called, by path, and fake tensors for their parameters and buffers, one for each kind.
    _called: dict[str, nn.Module] = field(default_factory=dict)
    _blanks: dict[Any, Tensor] = field(default_factory=dict)
    # Fake tensors for the memory of those that the graph reads; None for memory that the fake mode knows.
    _memories: dict[int, Tensor | None] = field(default_factory=dict)

    def of(self, node: fx.Node) -> tuple[Any, int]:
        """Return what a node computes, and the multiply-accumulates it takes; UNKNOWN where that asks for data."""
        if node.op == "placeholder":
            value = self.arguments[str(node.target).lstrip("*")]
            return pytree.tree_map_only(Tensor, lambda t: with_tags_of(t, self.fake_mode.from_tensor(t)), value), 0
        if node.op == "get_attr":
            value = self.first_values.get(str(node.target), self.root)
            for atom in () if value is not self.root else str(node.target).split("."):
                value = getattr(value, atom)
            value = value.value if isinstance(value, TrainingFlag) else value
            return (self._fake(value) if isinstance(value, Tensor) else value), 0
        args, kwargs = _mutable(fx.node.map_arg((node.args, node.kwargs), fake))
        leaves = pytree.tree_leaves((args, kwargs))
        if any(value is UNKNOWN for value in leaves):
            return UNKNOWN, 0
        if node.target is getattr or (_is_pythons(node.target) and not any(isinstance(v, Tensor) for v in leaves)):
            # Arithmetic on sizes, of which there is much, is spared what follows.
            return self._call(node, args, kwargs), 0
        try:
            with (
                # It does nothing while values are computed, and takes its time.
                without_mode(self.outer_mode),
                plain_settings(layer := self.called(node)),
                torch.no_grad(),
            ):
                call = Call(node, layer, args, kwargs)
                if (known := call.known(self.fake_mode)) is not None:
                    return known
                with self.fake_mode, Evaluation() as counter:
                    value = self._call(node, args, kwargs)
                call.remember(value, counter.macs, self._blanks.values())
            return value, counter.macs
        except NEEDS_DATA:
            return UNKNOWN, 0

    def called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls; None for other nodes."""
        if node.op != "call_module":
            return None
        return self.module(str(node.target))

    def module(self, path: str) -> nn.Module:
        """Return a module by its path."""
        if path not in self._called:
            self._called[path] = self.root.get_submodule(path)
        return self._called[path]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "call_function":
                assert callable(node.target)
                return (
                    None if node.target in _NOT_EVALUATED else STAND_INS.get(node.target, node.target)(*args, **kwargs)
                )
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case _:
                module = self.module(str(node.target))
                # With fake state: FakeTensorMode would count num_batches_tracked up for real.
                state = itertools.chain(module.named_parameters(), module.named_buffers())
                blank = {name: self._blank(tensor) for name, tensor in state}
                return torch.func.functional_call(module, blank, args, kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor for one of a module; those that share memory do so, too."""
        # Its own mode does nothing here, and takes its time.
        with without_mode(self.outer_mode):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                return self.fake_mode.from_tensor(tensor)
            memory = storage_id(tensor)
            if memory not in self._memories and is_dense(tensor):
                self._memories[memory] = made = make_fake_of(self.fake_mode, tensor)
                return made
            known = self._memories.setdefault(memory, None)
            return self.fake_mode.from_tensor(tensor) if known is None else make_fake_of(self.fake_mode, tensor, known)

    def _blank(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor for one of a leaf module; all of one shape are the same, as making them takes long."""
        is_plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if is_plain else id(tensor)
        if key not in self._blanks:
            own = make_fake_of if is_dense(tensor) else FakeTensorMode.from_tensor
            self._blanks[key] = own(self.fake_mode, tensor)
        return self._blanks[key]


def _is_pythons(target: Any) -> bool:
    return getattr(target, "__module__", None) in ("_operator", "builtins", "math")


def _mutable(argument: Any) -> Any:
    """Return arguments of a node with lists and dicts that a function may write into; those of fx are immutable."""
    if isinstance(argument, list):
        return [_mutable(item) for item in argument]
    if isinstance(argument, dict):
        return {key: _mutable(item) for key, item in argument.items()}
    return tuple(map(_mutable, argument)) if type(argument) is tuple else argument
