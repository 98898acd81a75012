"""Functions of torch that a tracer cannot see, made visible while it runs: factories, checks, the training flag."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.symbolic.proxies import PROXIES, TrainingFlag
from octav_fx.capture.symbolic.writes import is_same_memory
from octav_fx.capture.user_stack import user_caller
from octav_fx.compat.modules import parameters_of
from octav_fx.compat.tensors import CHECKS, assert_true, pytree, replace_extended_shape, validates_distributions
from octav_fx.errors import OctavError

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# What these make belongs to one call of forward: made at capture, it would keep what was drawn or written then.
_FACTORIES: Final = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "tensor", "as_tensor"),
)
# Of a leaf module what is set while it is evaluated.
_SETTINGS: Final[tuple[str, ...]] = ("training", "momentum")
# These want the number itself, or a dtype, and refuse a proxy for it.
_OF_PROXY: Final = ("finfo", "iinfo")
PLAIN: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)
_LITERAL: Final = (*PLAIN, complex, torch.layout, torch.memory_format, torch.Generator)


@contextlib.contextmanager
def symbolic_torch(tracer: "ValueTracer") -> Iterator[None]:
    """Make nodes, while tracing, of functions of torch that refuse proxies or that must run anew with the graph."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            if tracer.evaluating or not all(isinstance(leaf, _LITERAL) or type(leaf) in PROXIES for leaf in leaves):
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return call

    def of_proxy(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if any(type(arg) in PROXIES for arg in args):
                return tracer.create_proxy("call_function", original, args, {})
            return original(*args)

        return call

    def check(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(type(arg) in PROXIES for arg in (*args, *kwargs.values())):
                return original(*args, **kwargs)
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            condition = given["cond"] if "cond" in given else given["i"] >= 0
            if isinstance(condition.value, Tensor):
                condition = condition.all()
            said = given.get("message")
            text = said if isinstance(said, str) else f"{user_caller()}: the check there fails"
            return tracer.create_proxy("call_function", assert_true, (condition, text), {})

        return call

    def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
        # As it is in eager mode, where the compiler would meet proxies.
        return true_fn(*operands) if pred else false_fn(*operands)

    def is_tensor(x: Any) -> bool:
        return isinstance(x.value if type(x) in PROXIES else x, Tensor)

    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_OF_PROXY, *CHECKS, "is_tensor", "cond")}
    patched = {name: factory(originals[name]) for name in _FACTORIES}
    patched |= {name: of_proxy(originals[name]) for name in _OF_PROXY}
    patched |= {name: check(originals[name]) for name in CHECKS}
    patched |= {"is_tensor": is_tensor, "cond": cond}
    is_of_kind, validates = torch.jit.isinstance, validates_distributions()
    extended_shape = replace_extended_shape(_shape_of_samples)
    try:
        torch.jit.isinstance = lambda x, kind: is_of_kind(x.value if type(x) in PROXIES else x, kind)
        # They ask the data: a check would stop the trace, and changes no result.
        torch.distributions.Distribution.set_default_validate_args(False)
        for name, function in patched.items():
            setattr(torch, name, function)
        yield
    finally:
        torch.jit.isinstance = is_of_kind
        torch.distributions.Distribution.set_default_validate_args(validates)
        replace_extended_shape(extended_shape)
        for name, original in originals.items():
            setattr(torch, name, original)


def _shape_of_samples(distribution: torch.distributions.Distribution, sample_shape: Any = ()) -> tuple[Any, ...]:
    """Return a tuple: a torch.Size would hold the numbers of the example."""
    return (*sample_shape, *distribution.batch_shape, *distribution.event_shape)


@contextlib.contextmanager
def training_flags(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Make module.training a flag that the tracer sees; afterwards, whatever happened, it is the bool again."""
    # nn.Module keeps it as a plain attribute; a scripted module does not, and has no Python code to read it.
    modes = {module: module.training for module in root.modules() if "training" in module.__dict__}
    try:
        for name, module in root.named_modules():
            if module not in modes:
                continue
            module.__dict__["training"] = TrainingFlag(tracer, f"{name}.training".lstrip("."), module.training)
        yield
    finally:
        for module, training in modes.items():
            module.__dict__["training"] = training


@contextlib.contextmanager
def plain_settings(module: nn.Module | None) -> Iterator[None]:
    """Let a leaf module be evaluated without data: its training flags are bools, and no momentum is a count's.

    Compiled functions take nothing else, and how fast statistics follow is nothing that a shape depends on.
    """
    modules = [] if module is None else [m for m in module.modules() if "training" in m.__dict__]
    before = [(m.__dict__, {name: m.__dict__[name] for name in _SETTINGS if name in m.__dict__}) for m in modules]
    for held, settings in before:
        held["training"] = bool(getattr(settings["training"], "value", settings["training"]))
        if settings.get("momentum", 0) is None:
            held["momentum"] = 0.0
    try:
        yield
    finally:
        for held, settings in before:
            held.update(settings)


@contextlib.contextmanager
def assigned_parameters(tracer: "ValueTracer") -> Iterator[None]:
    """Let forward assign to a parameter what it has written into it: self.weight *= mask does so after the write."""
    original: Any = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if type(value) not in PROXIES or name not in parameters_of(module):
            original(module, name, value)
        elif not is_same_memory(tracer, value.node, parameters_of(module)[name]):
            raise OctavError(f"{user_caller()}: forward replaces the parameter {name}: write into it instead")

    nn.Module.__setattr__ = assign  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def unmoved_modules(tracer: "ValueTracer") -> Iterator[None]:
    """Say where forward moves a module to a device or a dtype, as offloading does: what it is given may be a proxy."""
    kind: Any = nn.Module
    originals = {name: getattr(kind, name) for name in ("to", "_apply")}

    def moved(name: str) -> Callable[..., Any]:
        def move(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if tracer.evaluating or module not in (tracer.submodule_paths or ()):
                return originals[name](module, *args, **kwargs)
            raise OctavError(
                f"{user_caller()}: forward moves {tracer.path_of_module(module)} to a device or dtype, and a graph "
                "moves no modules"
            )

        return move

    for name in originals:
        setattr(kind, name, moved(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(kind, name, original)
