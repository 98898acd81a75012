"""The arguments of a call, as quantize() is given them and as modules are called."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from octav_fx.capture.symbolic.patches import PLAIN
from octav_fx.compat.tensors import pytree, sample_of
from octav_fx.errors import OctavError


class Inputs(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    # Never written into.
    kwargs: dict[str, Any] = {}  # noqa: RUF012


def as_inputs(inputs: Any) -> Inputs:
    """Return a tensor, a tuple of arguments or a dict of keyword arguments as the Inputs of a call."""
    if isinstance(inputs, Mapping):
        return Inputs((), dict(inputs))
    return Inputs(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def batches_of(module: nn.Module, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Yield the Inputs of each batch: of one with labels, as loaders give it, what forward takes.

    A batch whose values are no arguments of forward, while the first of them alone is, is (x, y), and y is left out.
    Raises OctavError for batches that do not fit, and for a tensor in place of a list of batches.
    """
    if isinstance(batches, Tensor):
        raise OctavError("batches: a list of batches or a loader, not a tensor, whose rows would be the batches: [x]")
    for batch in batches:
        given = as_inputs(batch)
        if (fault := _misfit(module, given)) is not None:
            if len(given.args) < 2 or _misfit(module, first := Inputs(given.args[:1])) is not None:
                raise OctavError(f"a batch does not fit {type(module).__name__}.forward: {fault}; labels are left out")
            given = first
        yield given


def _misfit(module: nn.Module, call: Inputs) -> str | None:
    try:
        inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        return str(error)
    return None


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Return the call of a module whose parameters get these values in their order, keyword-only ones among them."""
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return Inputs(args, dict(kwargs))
    by_position = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    by_name = {p.name: value for p, value in zip(parameters[by_position:], args[by_position:], strict=False)}
    return Inputs(args[:by_position], {**by_name, **kwargs})


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, in their order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def sample_call(call: Inputs) -> Inputs:
    """Return a call without transforms of torch.func: of what vmap calls that of the first sample."""
    return Inputs(*pytree.tree_map_only(Tensor, sample_of, tuple(call)))


def same_kind(a: Inputs, b: Inputs) -> bool:
    """Tell whether two calls differ in the contents of tensors only."""
    (one, one_spec), (two, two_spec) = (pytree.tree_flatten((call.args, dict(call.kwargs))) for call in (a, b))
    return one_spec == two_spec and all(map(_is_alike, one, two))


def _is_alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)
