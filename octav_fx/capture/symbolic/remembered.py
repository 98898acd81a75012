"""What torch's functions and layers make of fake tensors, remembered: equal blocks of a model are evaluated once.

relu(x [2, 8, 6, 6])    -> a new tensor [2, 8, 6, 6]
x.transpose(1, 2)       -> the memory of x, [2, 6, 8, 6]
x.contiguous()          -> x
"""

import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.code_names import names_in
from octav_fx.compat.tensors import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    OpOverloadPacket,
    dtypes_around,
    make_fake,
    pytree,
    storage_id,
)

_PLAIN: Final = (
    *(type(None), type(...), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
# What each module holds for torch besides settings: parts, and hooks, most of them empty.
_TORCHS: Final = frozenset(vars(nn.Module())) - {"training"}
_PARTS: Final = ("_parameters", "_buffers")
_LIBRARIES: Final = ("torch", "_operator", "operator", "math", "builtins")
# So many kinds of calls are remembered.
_MOST: Final = 4096


class _NoKey(Exception):
    """What a value is cannot be told by plain values."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A fake tensor to make: of memory of its own, or of that of the tensor at a position among those given."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    of: int | None


@dataclass(frozen=True, slots=True)
class _Given:
    """The tensor at a position among those given."""

    at: int


# By what was called, with what kinds of arguments, and under which modes: a value with _Made and _Given in the places
# of tensors, and the multiply-accumulates.
_KNOWN: Final[dict[Any, tuple[Any, int]]] = {}


class Call:
    """A call of a node by what decides the kind of its result, and the tensors that were given to it."""

    def __init__(self, node: fx.Node, layer: nn.Module | None, args: Any, kwargs: Any) -> None:
        self.tensors: list[Tensor] = []
        self.kinds: list[Any] = []
        # None where more than plain values may decide, or nothing is spared.
        self.key: Any = None
        try:
            key = (_called(node, layer), self._kind((args, kwargs)), _modes())
        except _NoKey:
            return
        self._memories = [storage_id(tensor) for tensor in self.tensors]
        if self.tensors:
            self.key = (*key, _first_places(self._memories), _first_places([*map(id, self.tensors)]))

    def _kind(self, value: Any) -> Any:
        """Tell values apart, of tensors how they lie in memory: 1 is neither True nor 1.0."""
        if isinstance(value, Tensor):
            kind = _kind_of_tensor(value)
            self.tensors.append(value)
            self.kinds.append(kind)
            return kind
        if isinstance(value, _PLAIN):
            return type(value), value
        if type(value) is dict:
            return dict, tuple((key, self._kind(item)) for key, item in value.items())
        if type(value) in (tuple, list, torch.Size):
            return type(value), tuple(map(self._kind, value))
        if type(value) is slice:
            return slice, tuple(map(self._kind, (value.start, value.stop, value.step)))
        raise _NoKey

    def known(self, mode: FakeTensorMode) -> tuple[Any, int] | None:
        """Return a result made anew, and the multiply-accumulates; None where none of this kind is remembered."""
        if self.key is None or (found := _KNOWN.get(self.key)) is None:
            return None
        template, macs = found

        def filled(place: Any) -> Any:
            if isinstance(place, _Given):
                return self.tensors[place.at]
            if not isinstance(place, _Made):
                return place
            memory = None if place.of is None else self.tensors[place.of]
            return make_fake(mode, place.shape, place.stride, place.dtype, place.device, memory, place.offset)

        return pytree.tree_map(filled, template), macs

    def remember(self, value: Any, macs: int, state: Iterable[Tensor]) -> None:
        """Remember a result, if another one can be made like it. state: fake tensors of the layer that was called."""
        if self.key is None:
            return
        leaves, spec = pytree.tree_flatten(value)
        try:
            # What was called may have given an argument another shape, or other memory: t_(), set_().
            kinds, memories = map(_kind_of_tensor, self.tensors), map(storage_id, self.tensors)
            if [*kinds] != self.kinds or [*memories] != self._memories:
                return
            places = self._places(leaves, {storage_id(tensor) for tensor in state})
        except _NoKey:
            return
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[self.key] = pytree.tree_unflatten(places, spec), macs

    def _places(self, leaves: list[Any], taken: set[int]) -> list[Any]:
        """Return what stands for each part of a result. taken: memory that is neither given nor new."""
        memories, places = self._memories, list[Any]()
        for leaf in leaves:
            same = [at for at, tensor in enumerate(self.tensors) if tensor is leaf]
            if same or isinstance(leaf, _PLAIN):
                places.append(_Given(same[0]) if same else leaf)
                continue
            shape, stride, offset, dtype, device = _kind_of_tensor(leaf)
            memory = storage_id(leaf)
            of = memories.index(memory) if memory in memories else None
            is_other = (memory in taken or offset) if of is None else dtype is not self.tensors[of].dtype
            if is_other or leaf.requires_grad:
                raise _NoKey
            if of is None:
                # Two results may share what is new.
                taken.add(memory)
            places.append(_Made(shape, stride, offset, dtype, device, of))
        return places


def _first_places(values: list[int]) -> tuple[int, ...]:
    """Tell which of the values are one."""
    return tuple(map(values.index, values))


def _called(node: fx.Node, layer: nn.Module | None) -> Any:
    """Tell functions, methods and layers apart, the latter by all of their settings."""
    if layer is not None:
        return _settings(layer)
    target = node.target
    is_torchs = (getattr(target, "__module__", None) or "torch").partition(".")[0] in _LIBRARIES
    if not isinstance(target, str) and (not is_torchs or isinstance(target, (OpOverload, OpOverloadPacket))):
        # Ops may be the user's own.
        raise _NoKey
    return node.op, target


def _settings(layer: nn.Module) -> Any:
    kind: Any = type(layer)
    found = list[Any]()
    if not kind.__module__.startswith("torch.nn.modules."):
        raise _NoKey
    for name, value in vars(layer).items():
        if name in _PARTS:
            found.append((name, tuple((key, t if t is None else _kind_of_state(t)) for key, t in value.items())))
        elif name in _TORCHS:
            # Children, and hooks.
            if value:
                raise _NoKey
        elif name != "training" or _asks_for_mode(kind):
            found.append((name, _plain(value)))
    return kind, tuple(found)


@functools.cache
def _asks_for_mode(kind: Any) -> bool:
    """Tell whether a method of a layer names its mode: a convolution is the same one in both."""
    above = [vars(each).values() for each in kind.__mro__ if each not in (nn.Module, object)]
    codes = [value.__code__ for values in above for value in values if isinstance(value, types.FunctionType)]
    return any("training" in names_in(code) for code in codes)


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(map(_plain, value))
    raise _NoKey


def _kind_of_state(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        raise _NoKey
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _kind_of_tensor(tensor: Any) -> Any:
    is_plain = type(tensor) is FakeTensor and tensor.layout is torch.strided and tensor.constant is None
    # Those made in inference mode are other than their views, and say so.
    if not is_plain or tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        raise _NoKey
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _modes() -> Any:
    """Return what else decides dtypes, and which of torch's attentions runs."""
    if torch.is_inference_mode_enabled():
        raise _NoKey
    cuda = torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    return *dtypes_around(), attention, cuda.cudnn_sdp_enabled()
