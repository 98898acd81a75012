"""WholeModule: a module of the user's class, whose forward is graphs."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from octav_fx.capture.classes import highest_stand_in, stand_in, users_class
from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.held import hold, let_go
from octav_fx.capture.module_state import without_history
from octav_fx.capture.modules import GRAPHS, QuantizedModule, graphs_of, hidden_quantizers
from octav_fx.capture.permits import is_permitted, permitted
from octav_fx.capture.replaced import STRUCTURE, is_changed, remember_structure
from octav_fx.compat.graphs import is_writing_onnx
from octav_fx.compat.modules import children_of, parameters_of, share_parts
from octav_fx.compat.tensors import is_sharded
from octav_fx.errors import OctavError
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn.fake_quantizer import QUANTIZERS


class WholeModule:
    """Marks a module that graphs hold: make_whole() makes its class a subclass of the user's and of this one.

    isinstance, attributes, methods, keys, hooks and the signature of forward are those of the user's class. What the
    graphs are asked for (graph, code, records, meta) is found where the user has no attribute of that name.
    """

    @property
    def _float_module(self) -> Any:
        """Return what a graph finds when it stores or reads an attribute of the outermost module."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a graph that holds for the call computes; after modules below were replaced, one of now."""
        _check_not_onnx(self)
        graphs: QuantizedModule = vars(self)[GRAPHS]
        own = vars(self).get("forward")
        if own is not None and getattr(own, "__self__", None) is graphs:
            # In as_float, and its own Python calls type(self).forward(self, x).
            return own(*args, **kwargs)
        owner: Any = graphs.owner
        if owner is not self:
            raise OctavError(
                f"this {type(self).__name__} was made of what another one holds (as accelerate's regional compilation "
                "and nn.DataParallel do), and the graph would run the parts of that one. Compile the whole model "
                '(q.compile(backend="octav")), or quantize(..., blocks="auto"), whose blocks are compiled one by one; '
                "on several GPUs, DistributedDataParallel"
            )
        if is_changed(graphs.owner):
            graphs._run_look(args, kwargs)
            if GRAPHS not in vars(self):
                # It is of another class now, and runs its own Python; a forward below that is running.
                return highest_stand_in(type(self)).forward(self, *args, **kwargs)
        return vars(self)[GRAPHS].forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the mode as the user's class does, and take the graph of that mode where it has its own."""
        super().train(mode)  # type: ignore[misc]
        vars(self)[GRAPHS].follow(mode)
        return self

    def __repr__(self) -> str:
        # torch.onnx.export describes a model before it runs it, and would wrap an error of the run in one of its own.
        if not is_permitted():
            _check_not_onnx(self)
        return super().__repr__()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter as the user's class does, but none of parallelize_module, whose products give parts of sums.

        Those of FSDP2 do not come this way, and are whole when the graph runs.
        """
        if param is not None and is_sharded(param):
            raise OctavError(
                f"{name} of {type(self).__name__} is sharded by tensor parallelism, which no graph runs: shard blocks "
                "by torch.distributed.fsdp.fully_shard, or make them stages of a pipeline"
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)[GRAPHS].forget_state()
        # A user's class may not take all that nn.Module's takes.
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        vars(self)[GRAPHS].forget_state()
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            graphs = vars(self).get(GRAPHS)
            if graphs is None or not (hasattr(QuantizedModule, name) or name in vars(graphs)):
                raise
            return getattr(graphs, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass has no name to be pickled by.
        return _new, self._classes(), self._state()

    @torch.compiler.disable(reason="octav_fx copies graphs and quantizers")
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        graphs: QuantizedModule = vars(self)[GRAPHS]
        owner: Any = self
        memo.update(without_history(owner))
        copied = memo[id(self)] = _new(*self._classes())
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        vars(copied)[GRAPHS].examples = graphs.examples
        return copied

    def _classes(self) -> tuple[type, type]:
        """Return the user's class, and one below it that others have set since, or the same again."""
        return vars(self)[GRAPHS].user_class, users_class(type(self))

    def _state(self) -> tuple[Any, ...]:
        """Return what the user's class says its state is, and the graphs."""
        graphs: QuantizedModule = vars(self)[GRAPHS]
        # torch refuses the state of a module with parametrizations, for its pickles; a copy may have it.
        state: Any = dict(vars(self)) if is_parametrized(self) else self.__getstate__()  # type: ignore[arg-type]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != GRAPHS}
            if getattr(state.get("forward"), "__self__", None) is graphs:
                # That of as_float.
                del state["forward"]
        return (state, *graphs._parts())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        users, *parts = state
        super().__setstate__(users)  # type: ignore[misc]
        owner: Any = self
        present = type(self)
        owner.__class__ = users_class(highest_stand_in(present))
        quantizers = children_of(owner).pop(QUANTIZERS)
        graphs, meta, recipe, capture_again = parts
        make_whole(QuantizedModule(owner, graphs, meta, recipe, capture_again, quantizers))
        owner.__class__ = present


def _check_not_onnx(q: object) -> None:
    """Raise OctavError where torch.onnx.export asks: its ops round nothing to a grid and hold no codes of four bits."""
    if is_writing_onnx():
        raise OctavError(
            f"torch.onnx.export knows no quantizers, and {type(q).__name__} has some: octav_fx.calibrate, "
            "octav_fx.freeze, and then octav_fx.export_onnx write this model"
        )


def make_whole(graphs: QuantizedModule) -> nn.Module:
    """Let the forward of the owner be its graphs; return the owner, which is of a subclass of its class from now on."""
    owner = graphs.owner
    called = [graphs.get_submodule(path) for path in graphs.called()]
    hold(owner, [*called, *_whole_below(owner)], filter(_multiplies, owner.modules()))
    children_of(owner)[QUANTIZERS] = children_of(graphs)[QUANTIZERS]
    share_parts(owner, graphs)
    kind: Any = type(owner)
    owner.__class__ = _whole_class(kind)
    vars(owner)[GRAPHS] = graphs
    remember_structure(owner)
    constants = constants_of(owner)
    for guarded in graphs._captured():
        guarded.hold_constants(constants)
    return owner


def make_users_own(owner: nn.Module) -> None:
    """Take make_whole() back for good."""
    graphs = vars(owner).pop(GRAPHS)
    owner.__class__ = graphs.user_class
    del children_of(owner)[QUANTIZERS]
    for module, _ in vars(owner).pop(STRUCTURE).children:
        let_go(module)


def _whole_below(owner: nn.Module) -> list[nn.Module]:
    return [module for module in owner.modules() if graphs_of(module) is not None]


def _multiplies(module: nn.Module) -> bool:
    """Tell whether forward of a module reads a matrix: one of torch's layers, or one of the user's classes."""
    if op_of_module(module) is not None:
        return op_of_module(module) in CONTRACTIONS
    is_torchs = type(module).__module__.startswith("torch.nn")
    return not is_torchs and any(p is not None and p.dim() > 1 for p in parameters_of(module).values())


@contextmanager
def users_own(root: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """Make every module in root what it was before quantize() inside: of the user's class, without quantizers.

    but: one that stays as it is.
    """
    held = {module: graphs_of(module) for module in root.modules() if module is not but}
    whole = {module: graphs for module, graphs in held.items() if graphs is not None}
    kinds, quantizers = {module: type(module) for module in whole}, {}
    for module, graphs in whole.items():
        module.__class__ = graphs.user_class
        quantizers[module] = children_of(module).pop(QUANTIZERS)
        del vars(module)[GRAPHS]
    try:
        with permitted():
            yield
    finally:
        for module, graphs in whole.items():
            module.__class__ = kinds[module]
            children_of(module)[QUANTIZERS] = quantizers[module]
            vars(module)[GRAPHS] = graphs


# Of a container, which must not count the quantizers among its children.
_CONTAINER_METHODS: Final = ("__len__", "__getitem__", "__iter__", "__contains__", "__reversed__")
_CONTAINER_CHANGES: Final = ("__setitem__", "__delitem__", "append", "insert", "extend", "pop", "clear")


@functools.cache
def _whole_class(kind: Any) -> type[nn.Module]:
    """Return the subclass of a user's class for modules that graphs hold."""

    @functools.wraps(kind.forward)
    def forward(self: WholeModule, *args: Any, **kwargs: Any) -> Any:
        return WholeModule.forward(self, *args, **kwargs)

    names = {name: _unseen(getattr(kind, name)) for name in _CONTAINER_METHODS if hasattr(kind, name)}
    names |= {name: _shared(_unseen(getattr(kind, name))) for name in _CONTAINER_CHANGES if hasattr(kind, name)}
    return stand_in(kind, WholeModule, forward, names)


def code_around(kind: Any) -> CodeType:
    """Return the code that runs first where the forward of a user's class is graphs.

    It is the user's where the class wraps the forward of each subclass, as the layers of transformers do.
    """
    code: CodeType = _whole_class(kind).forward.__code__
    return code


def _unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a container that does not see the quantizers."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        with hidden_quantizers(self):
            found = method(self, *args)
            return iter(list(found)) if method.__name__ in ("__iter__", "__reversed__") else found

    return call


def _shared(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a container after which its graphs have what it has: in a new dict, where it deletes."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        found = method(self, *args)
        share_parts(self, vars(self)[GRAPHS])
        return found

    return call


def _new(kind: Any, below: Any = None) -> Any:
    """Return a module of the subclass for a user's class, or for one below it, without anything in it yet."""
    # Past __new__ of the user's class: that of a GraphModule makes one more class.
    made: Any = object.__new__(_whole_class(kind))
    if below not in (None, kind):
        made.__class__ = below
    return made
